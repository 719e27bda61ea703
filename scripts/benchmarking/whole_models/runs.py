"""The timed parts of a model: the prompt, a step of decoding, a step of training."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarking.whole_models.pairs import Pair
from benchmarking.whole_models.settings import ModelCase, RunSettings
from infllm_flex.training.loss import LanguageLoss
from infllm_flex.training.quiet import quiet_transformers

_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

_LOGITS_MIB = 512  # few chunks, which still fit beside the activations


class Timed(NamedTuple):
    """One model of a comparison, ready to run.

    Attributes:
        attention: ``"dense"`` or ``"sparse"``.
        run: Runs it once.
        steps: Steps that one run takes.
    """

    attention: str
    run: Callable[[], object]
    steps: int = 1


@contextlib.contextmanager
def prepared(run: RunSettings, case: ModelCase, pair: Pair, length: int) -> Iterator[list[Timed]]:
    """Prepare the dense and the patched model for one phase, and tidy up afterwards.

    Args:
        run: Seed, steps and the backend of the compiler.
        case: Phase, batch and backend of the dense model.
        pair: The models.
        length: Tokens.
    """
    models = {"dense": pair.dense, "sparse": pair.sparse}
    if case.phase in ("decode", "decode_static"):
        timed = [_decoding(name, m, run, case, pair, length) for name, m in models.items()]
        yield timed
        return
    embeds = pair.embeddings(case.batch, length, run.seed)
    if case.phase == "prefill":
        yield [
            Timed(name, _on_backend(functools.partial(first_token, m, embeds), name, case))
            for name, m in models.items()
        ]
        return
    labels = torch.randint(pair.shape.vocab_size, embeds.shape[:2], device=embeds.device)
    with training(pair):
        yield [
            Timed(name, _on_backend(functools.partial(train, m, embeds, labels), name, case))
            for name, m in models.items()
        ]


@torch.no_grad()
def first_token(model: Any, embeds: Tensor) -> Tensor:
    """Read a prompt ``[B, S, width]`` into a new cache and choose the first token."""
    out = model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1:].argmax(-1)


def train(model: Any, embeds: Tensor, labels: Tensor) -> None:
    """Take gradients of the loss of every token, and drop them."""
    LanguageLoss(model, _LOGITS_MIB)(labels, inputs_embeds=embeds, use_cache=False).backward()
    model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def training(pair: Pair) -> Iterator[None]:
    """Let both models recompute every layer in the backward pass, inside the block."""
    models = pair.dense, pair.sparse
    for model in models:
        # transformers renames the method; tried: 5.17 and 5.24.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.train()
    try:
        yield
    finally:
        for model in models:
            disable = getattr(model, "activation_checkpointing_disable", None)
            (disable or model.gradient_checkpointing_disable)()
            model.eval().zero_grad(set_to_none=True)


def filled_cache(model: Any, case: ModelCase, pair: Pair, length: int, room: int, seed: int) -> Any:
    """Make a cache that holds random keys and values of ``length`` tokens in every layer.

    Args:
        model: The model that will read it.
        case: ``decode_static`` makes a static cache; ``batch``.
        pair: Sizes.
        length: Tokens.
        room: Further tokens that a static cache can take.
        seed: Seed of keys and values, which are the same in all layers.
    """
    weight = model.get_input_embeddings().weight
    size = (case.batch, pair.shape.num_kv_heads, length, pair.shape.head_dim)
    random = torch.Generator(weight.device).manual_seed(seed)
    key, value = (
        torch.empty(size, dtype=weight.dtype, device=weight.device).normal_(generator=random)
        for _ in range(2)
    )
    with quiet_transformers() as transformers:
        if case.phase == "decode_static":
            cache = transformers.StaticCache(config=model.config, max_cache_len=length + room)
        else:
            cache = transformers.DynamicCache(config=model.config)
    for layer in range(pair.layers):
        cache.update(key, value, layer)
    return cache


class Decoder:
    """Greedy decoding over a filled cache.

    Args:
        forward: The model, or the compiled model.
        model: The model.
        cache: Its cache.
        batch: ``B``.
    """

    def __init__(self, forward: Callable[..., Any], model: Any, cache: Any, batch: int) -> None:
        self._forward = forward
        device = model.get_input_embeddings().weight.device
        self._tokens = torch.ones(batch, 1, dtype=torch.int64, device=device)
        self._cache = {cache_keyword(model): cache}

    @torch.no_grad()
    def steps(self, number: int) -> None:
        """Generate ``number`` tokens of each sequence."""
        for _ in range(number):
            out = self._forward(input_ids=self._tokens, use_cache=True, **self._cache)
            self._tokens = out.logits[:, -1:].argmax(-1)


def cache_keyword(model: Any) -> str:
    """The name of the argument for the cache, which depends on the version of transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def decoded_tokens(run: RunSettings) -> int:
    """Count the tokens that all runs of a decoding generate: warm-up, rounds, and two more."""
    return 1 + (run.warmup + run.rounds + 2) * run.steps


def _decoding(
    name: str, model: Any, run: RunSettings, case: ModelCase, pair: Pair, length: int
) -> Timed:
    cache = filled_cache(model, case, pair, length, decoded_tokens(run), run.seed)
    forward = model
    if case.phase == "decode_static":
        # One uncompiled step, as generate() takes one, allocates what belongs to the cache.
        Decoder(model, model, cache, case.batch).steps(1)
        mode = "reduce-overhead" if run.compile_backend == "inductor" else None
        forward = torch.compile(model, backend=run.compile_backend, mode=mode)
    decoder = Decoder(forward, model, cache, case.batch)
    steps = _on_backend(functools.partial(decoder.steps, run.steps), name, case)
    return Timed(name, steps, run.steps)


def _on_backend(action: Callable[[], object], name: str, case: ModelCase) -> Callable[[], object]:
    """Let the dense model attend by the backend that the case asks for."""
    if name != "dense" or case.dense == "default":
        return action

    def run() -> object:
        with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
            return action()

    return run
