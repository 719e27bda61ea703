"""Tiny causal LMs with random weights, the settings they are patched with, and their inputs."""

import inspect
from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.inputs import on_default_device

SETTINGS = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 16,
    "init_blocks": 1,
    "window_size": 16,
    "topk": 4,
    "dense_len": 96,
    "engine": "fused",  # needs no compiler; a test of its own covers the other engine
}
# One token below dense_len, and beyond. A query selects 5 of LONG's 8 blocks, two of them by score:
# the first, its own and the one before are always selected.
SHORT, LONG = 95, 128
EVERYTHING = {**SETTINGS, "topk": LONG // SETTINGS["block_size"]}

# The keyword for a cache depends on the version of transformers.
CACHE = (
    "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
)


def enable_checkpointing(model: PreTrainedModel, use_reentrant: bool = False) -> None:
    """Recompute activations in the backward pass."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


_SIZE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Random weights of the usual 0.02 give all keys almost the same logit; with these, keys differ.
_SPREAD = {"initializer_range": 0.3}


def _config(kind: type[PretrainedConfig], **changes: object) -> PretrainedConfig:
    return kind(**{**_SIZE, **_SPREAD, **changes})


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: _config(LlamaConfig),
    "qwen2": lambda: _config(Qwen2Config),
    "qwen3": lambda: _config(Qwen3Config, head_dim=16),
    "mistral": lambda: _config(MistralConfig, sliding_window=None),
    "phi3": lambda: _config(Phi3Config),
    "olmo2": lambda: _config(Olmo2Config),
    "gpt_neox": lambda: _config(GPTNeoXConfig),
    "gpt2": lambda: _config(GPT2Config, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
    "granite": lambda: _config(GraniteConfig),
    "gemma2": lambda: gemma2(),
}
# Gemma 2 is tested eager only.
VARIANTS = [(name, how) for name in CONFIGS for how in ("sdpa", "eager") if name != "gemma2"]
VARIANTS.append(("gemma2", "eager"))
FULL_ATTENTION = [name for name in CONFIGS if name != "gemma2"]


def gemma2(**changes: object) -> PretrainedConfig:
    """Sliding and full attention alternate; eager by default, without soft-capped logits."""
    return _config(
        Gemma2Config,
        **{
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 32,
            "attn_logit_softcapping": None,
            **changes,
        },
    )


def build(config: str | PretrainedConfig = "llama", **kwargs: object) -> PreTrainedModel:
    """A model with the same weights on every call."""
    torch.manual_seed(0)
    config = CONFIGS[config]() if isinstance(config, str) else config
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, **kwargs)
    return model.to(torch.get_default_device()).eval()


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    """``[batch, length]`` token ids, without special ones."""
    random = torch.Generator().manual_seed(length)
    return on_default_device(torch.randint(3, 64, (batch, length), generator=random, device="cpu"))


def logits(model: PreTrainedModel, length: int, **kwargs: object) -> torch.Tensor:
    """Logits of one forward over `tokens`, without gradients."""
    with torch.no_grad():
        return model(tokens(length), **kwargs).logits


def loss_and_gradients(model: PreTrainedModel, length: int, **kwargs: object) -> list[torch.Tensor]:
    """The training loss over `tokens`, then the gradient of every parameter that has one."""
    model.train()
    model.zero_grad()
    batch = tokens(length)
    loss = model(batch, labels=batch, use_cache=False, **kwargs).loss
    loss.backward()
    model.eval()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are the same, bit for bit."""
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
