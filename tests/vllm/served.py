"""A vLLM engine of a tiny model, and its judge: the same folder in transformers, patched."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import infllm_flex as ifx
from tests.tiny_model import byte_tokenizer

TOLERANCE = 1e-4
NEW_TOKENS = 12
SHAPE = {
    "vocab_size": 258,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
# Longer than the budget of 128 tokens: whole prompts would differ from chunks by sequence length.
SETTINGS = {
    "kernel_size": 16,
    "kernel_stride": 8,
    "init_blocks": 1,
    "block_size": 32,
    "window_size": 32,
    "topk": 3,
    "dense_len": 192,
}


def write_llama(folder: Path, **changes: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return write_model(LlamaForCausalLM(LlamaConfig(**SHAPE, **changes)), folder)


def write_minicpm(folder: Path, **changes: Any) -> Path:
    """A model of the shape of MiniCPM 4.1: scale factors, longrope, grouped heads."""
    from transformers import AutoModelForCausalLM

    from infllm_flex.minicpm.config import MiniCPMConfig

    factors = 1 + torch.arange(16) / 64
    rope = {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": (2 * factors).tolist(),
        "original_max_position_embeddings": SHAPE["max_position_embeddings"],
    }
    scales = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 64}
    torch.manual_seed(0)
    config = MiniCPMConfig(**SHAPE | scales | {"rope_scaling": rope} | changes)
    return write_model(AutoModelForCausalLM.from_config(config), folder)


def write_model(model: Any, folder: Path) -> Path:
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data.mul_(3)  # otherwise attention is nearly even, and blocks hardly matter
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def make_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 258, (n,), generator=generator).tolist() for n in lengths]


class Answer(NamedTuple):
    """The answer of vLLM to a prompt.

    Attributes:
        ids: The prompt's tokens and the generated ones.
        log_probs: Those of the last tokens of ``ids``.
        num_cached: Tokens of the prompt that were in the cache.
    """

    ids: list[int]
    log_probs: Tensor
    num_cached: int


@contextlib.contextmanager
def engine(folder: Path, settings: Any = None, **arguments: Any) -> Iterator[Any]:
    """A vLLM engine in this process, unless ``arguments`` say otherwise."""
    from vllm import LLM

    defaults: dict[str, Any] = {
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "dtype": "float32",
        "kv_cache_memory_bytes": 64 << 20,
        "enable_prefix_caching": False,
    }
    additional = {} if settings is None else {"additional_config": {"infllm": settings}}
    llm = LLM(model=str(folder), **defaults | additional | arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def layers_of(llm: Any) -> dict[str, Any]:
    """The attention layers of an engine in this process, by name."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    runner = executor.driver_worker.worker.model_runner
    return runner.compilation_config.static_forward_context


def ask(
    llm: Any,
    prompts: list[list[int]],
    *,
    of_prompt: bool = False,
    num_new: int = NEW_TOKENS,
    **options: Any,
) -> list[Answer]:
    """Generate greedily. With ``of_prompt`` the prompt's log-probabilities are returned, too."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0,
        max_tokens=num_new,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0 if of_prompt else None,
    )
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = []
    outputs = llm.generate(requests, sampling, use_tqdm=False, **options)
    for prompt, out in zip(prompts, outputs, strict=True):
        new = list(out.outputs[0].token_ids)
        tokens = [*(prompt[1:] if of_prompt else []), *new]
        rows = [*(out.prompt_logprobs[1:] if of_prompt else []), *out.outputs[0].logprobs]
        found = [row[token].logprob for row, token in zip(rows, tokens, strict=True)]
        answers.append(Answer([*prompt, *new], torch.tensor(found), out.num_cached_tokens or 0))
    return answers


class Judge:
    """The folder's model in transformers, dense, and patched to go by position."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        config = ifx.InfLLMConfig(**settings)
        self._all_dense = max(config.longest_dense, config.budget_tokens)  # all keys are seen
        self._dense, self._sparse = _load(folder), _load(folder)
        if any(row.sparse for row in ifx.describe(self._dense)):  # by a sparse_config
            ifx.unpatch_model(self._dense)
        ifx.patch_model(self._sparse, {**settings, "dense_by": "position", "engine": "fused"})

    def check(self, answers: list[Answer]) -> None:
        """Assert that log-probabilities are the patched model's, and not the dense model's."""
        for ids, log_probs, _ in answers:
            sparse, dense = (_log_probs(m, ids)[-len(log_probs) :] for m in self._models)
            error = (sparse - log_probs).abs().max().item()
            assert error <= TOLERANCE, f"{len(ids)} tokens: {error:.1e} from the patched model"
            if len(ids) > self._all_dense + 1:
                apart = (dense - log_probs).abs().max().item()
                assert apart >= 10 * TOLERANCE, f"{len(ids)} tokens: dense is {apart:.1e} away"

    def check_dense(self, answers: list[Answer]) -> None:
        """Assert that log-probabilities are the dense model's."""
        for ids, log_probs, _ in answers:
            error = (_log_probs(self._dense, ids)[-len(log_probs) :] - log_probs).abs().max().item()
            assert error <= TOLERANCE, f"{len(ids)} tokens: {error:.1e} from the dense model"

    def mean_distances(self, answer: Answer) -> tuple[float, float]:
        """The mean distances of log-probabilities from the patched and from the dense model's."""
        ids, log_probs, _ = answer
        rows = (_log_probs(m, ids)[-len(log_probs) :] for m in self._models)
        sparse, dense = ((row - log_probs).abs().mean().item() for row in rows)
        return sparse, dense

    @property
    def _models(self) -> tuple[Any, Any]:
        return self._sparse, self._dense


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def _log_probs(model: Any, ids: list[int]) -> Tensor:
    """The log-probability of each token but the first."""
    scores = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
