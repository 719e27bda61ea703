"""Decoding over a transformers cache: where an attention layer finds its own layer of the cache.

transformers hands attention functions the keys of a cache, not the cache. A hook on each attention
layer passes it on. The compressed keys live on the cache's own layers (`cache_state`): they go
where the cache goes, two generations never share any, and no module remembers one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from infllm_flex.patch.huggingface.cache_state import is_static, track_layer
from infllm_flex.patch.huggingface.instance_forward import watch_call

KEYWORD = "infllm_cache"
# What attention layers call their cache, by version and family.
_CACHE_NAMES = ("cache", "past_key_values", "layer_past", "past_key_value")


def install_cache_hook(module: nn.Module) -> None:
    """Have the attention function of ``module`` called with its cache, as ``infllm_cache``."""
    if _pass_cache_on not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_pass_cache_on, with_kwargs=True)


def remove_cache_hook(module: nn.Module) -> None:
    """Undo `install_cache_hook`. By the hook itself: a copied model has hooks, but no handles."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _pass_cache_on:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _pass_cache_on(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not torch.compiler.is_compiling() and "forward" in vars(module):
        watch_call(module)
    for name in _CACHE_NAMES:
        cache = kwargs.get(name)
        if cache is not None:
            return args, {**kwargs, KEYWORD: cache}
    return None


# Stands for the layer of a cache that handed over something other than what its layers hold.
UNKNOWN_LAYER = object()


def cache_layer(cache: object, module: nn.Module, key: Tensor) -> Any:
    """Find the layer of a cache by the keys that an attention layer was handed.

    Where a layer stores its keys is its own affair: under its index, in turns, in another's slot.

    Args:
        cache: What was delivered to the attention layer; None where it has none.
        module: The attention layer.
        key: The keys that it attends to.

    Returns:
        The layer that holds ``key``; None without a cache; `UNKNOWN_LAYER` if the model computes
        ``key`` from what the cache holds, or the cache from what it stores.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    index = getattr(module, "layer_idx", None)
    own = layers[index] if isinstance(index, int) and index < len(layers) else None
    if own is not None and _holds(own, key):
        return own
    for layer in layers:
        if _holds(layer, key):
            return layer
    if getattr(cache, "offloading", False) and not torch.compiler.is_compiling():
        for layer in layers:
            track_layer(layer)  # so that it remembers, from now on, what it returns
    # How far a preallocated cache is filled is the same in all layers that were updated so far.
    return own if is_static(own) else UNKNOWN_LAYER


def _holds(layer: Any, key: Tensor) -> bool:
    holds = getattr(layer, "infllm_holds", None)  # of a layer whose ``keys`` are for its users
    return getattr(layer, "keys", None) is key if holds is None else bool(holds(key))
