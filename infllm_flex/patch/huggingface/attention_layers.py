"""Which modules of a transformers model are attention layers, and which of them can be sparse."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.head_dims import head_dim_skip_reason
from infllm_flex.patch.huggingface import causality, transformers_private
from infllm_flex.patch.huggingface.config_view import PATCHED_NAMES, PREVIOUS_NAMES
from infllm_flex.patch.huggingface.instance_forward import unreached_reason
from infllm_flex.patch.layer_configs import config_of_layer
from infllm_flex.patch.layer_state import PatchedLayer
from infllm_flex.patch.skip_reasons import (
    LEARNED_MASK,
    OTHER_KEYS,
    OWN_INDEXER,
    POSITION_BIAS,
    SINKS,
    sliding_window,
    soft_capped,
)

# Layer types that attend to all keys. "hybrid": beside a state space model in the same layer.
_FULL = ("full_attention", "hybrid")


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules that take their attention function from transformers' registry, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if transformers_private.reads_attention_registry(_undecorated_forward(module))
    }


def makes_masks(module: nn.Module) -> bool:
    """Whether a module's forward asks transformers for masks, itself or by its base's forward."""
    return _class_makes_masks(type(module))  # type: ignore[arg-type]


@functools.cache
def _class_makes_masks(cls: type) -> bool:
    forwards = (vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base))
    return transformers_private.makes_masks(map(inspect.unwrap, forwards))


def _undecorated_forward(module: nn.Module) -> Callable[..., Any]:
    return inspect.unwrap(type(module).forward)


def find_skip_reason(module: nn.Module) -> str | None:
    """Why an attention layer cannot be sparse, in a few words; None when it can."""
    config: Any = module.config
    if (reason := causality.find_skip_reason(module)) is not None:
        return reason
    if (window := _window(module)) is not None:
        return sliding_window(window)
    if _has_no_keys(config):
        return OTHER_KEYS
    if (layer_type := _layer_type(module)) not in (None, *_FULL):
        return str(layer_type).replace("_", " ")
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        return soft_capped(cap)
    if getattr(module, "sinks", None) is not None:
        return SINKS
    if getattr(module, "indexer", None) is not None:
        return OWN_INDEXER
    if hasattr(module, "prepare_dynamic_mask"):  # Doge: weights of the keys, added to logits
        return LEARNED_MASK
    if transformers_private.passes_keyword(_undecorated_forward(module), "position_bias"):
        return POSITION_BIAS
    if (heads := head_dim_skip_reason(module)) is not None:
        return heads
    if (unreached := unreached_reason(module)) is not None:
        return unreached
    if (previous := previous_implementation(module)) not in PATCHED_NAMES:
        return f"attn_implementation={previous!r}, not 'sdpa' or 'eager'"
    return None


def _layer_type(module: nn.Module) -> str | None:
    """The config's word for the layer; None where it has none."""
    layer_types = getattr(module.config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return None if layer_types is None or index is None or index < 0 else layer_types[index]


def _window(module: nn.Module) -> int | None:
    """The layer's window, its own or its config's, if any sequence can be longer than it."""
    layer_type = _layer_type(module)
    if layer_type == "full_attention":  # some classes store the other layers' window here as well
        return None
    window: Any = None
    if hasattr(module, "sliding_window"):
        window = module.sliding_window
    elif layer_type not in _FULL:
        own = config_of_layer(module.config, getattr(module, "layer_idx", None))
        window = getattr(own, "sliding_window", None)
    longest = _longest_sequence(module.config)
    never = longest is not None and window is not None and longest <= window
    return None if never else window


def inherited_windows(model: nn.Module) -> dict[nn.Module, int]:
    """Windows that a model puts into the masks of layers whose own config has none.

    BLT's config has one window for both its local parts, whose own configs lack it.
    """
    windows: dict[nn.Module, int] = {}
    for part in model.modules():
        window = getattr(getattr(part, "config", None), "local_attention_window_len", None)
        if window is None:
            continue
        for name, module in part.named_modules():
            if any(piece.startswith("local_") for piece in name.split(".")):
                windows[module] = window
    return windows


def _has_no_keys(config: Any) -> bool:
    """Whether all layers take their keys from outside, as those of Gemma 4's drafters do."""
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    return shared > 0 and shared >= config.num_hidden_layers


def _longest_sequence(config: Any) -> float | None:
    """Number of positions of a model, rope scaling included; None if the config has none."""
    longest = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(longest, int) or not isinstance(rope, Mapping):
        return longest
    scaled = [part for part in (rope, *rope.values()) if isinstance(part, Mapping)]
    original = (part.get("original_max_position_embeddings") or longest for part in scaled)
    factor = (part.get("factor") or 1 for part in scaled)
    return max(longest, *(a * b for a, b in zip(original, factor, strict=True)))


def implementation(module: nn.Module) -> str:
    """The name under which a layer looks up its attention function."""
    return str(transformers_private.get_implementation(module.config))


def previous_implementation(module: nn.Module) -> str:
    """The same as before patching."""
    name = implementation(module)
    return PREVIOUS_NAMES.get(name, name)


def make_layer(
    module: nn.Module, config: InfLLMConfig, skip_reason: str | None, **fields: Any
) -> PatchedLayer:
    """Make the record of an attention layer, with the attention functions that it had before."""
    forward = _undecorated_forward(module)
    previous = transformers_private.attention_functions(forward, PATCHED_NAMES)
    return PatchedLayer(config, previous, skip_reason, **fields)
