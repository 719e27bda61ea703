"""Pass each attention layer's cache on to the attention function.

transformers gives attention functions the keys of a cache, not the cache. They take it from the
forward of the model around them. Layers outside such a model have a hook that adds it. The
compressed keys live on the cache's own layers (`cache_state`): they go where the cache goes, two
generations never share any, and no module remembers one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from infllm_flex.patch.huggingface.cache_updates import track_layer
from infllm_flex.patch.huggingface.config_view import PREVIOUS_NAMES
from infllm_flex.patch.huggingface.instance_forward import watch_call
from infllm_flex.patch.huggingface.transformers_private import (
    cache_layers,
    find_cache,
    get_implementation,
    is_offloading,
    is_paged,
    is_static,
)
from infllm_flex.patch.layer_state import get_layer
from infllm_flex.patch.running_forward import current_forward
from infllm_flex_ops import torch_private

KEYWORD = "infllm_cache"


def install_cache_hook(module: nn.Module) -> None:
    """Make a layer's attention function receive the cache, as ``infllm_cache``."""
    if _add_cache not in torch_private.forward_pre_hooks(module):
        module.register_forward_pre_hook(_add_cache, with_kwargs=True)


def remove_cache_hook(module: nn.Module) -> bool:
    """Undo `install_cache_hook`; False where there is nothing to undo."""
    installed = _add_cache in torch_private.forward_pre_hooks(module)
    if installed:
        torch_private.remove_forward_pre_hooks(module, lambda hook: hook is _add_cache)
    return installed


def _add_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling() and "forward" in vars(module):
        watch_call(module)
    cache = find_cache(kwargs)
    if cache is not None:
        if is_paged(cache):
            require_our_name(module)
        kwargs[KEYWORD] = cache  # the dict is of this call alone, and a copy takes time


def require_our_name(module: nn.Module) -> None:
    """Raise a NotImplementedError where continuous batching would attend densely unasked."""
    layer, name = get_layer(module), get_implementation(module.config)
    if layer is not None and layer.skip_reason is None and name not in PREVIOUS_NAMES:
        raise NotImplementedError(
            f"continuous batching would attend densely, by attn_implementation={name!r}, in a "
            "model that was patched to be sparse: call patch_model again and pass "
            "ContinuousBatchingConfig(auto_switch_to_flash=False), or call unpatch_model"
        )


def take_cache(module: nn.Module, kwargs: dict[str, Any]) -> Any:
    """Take the cache of a call out of its keywords, or from the forward of the model around it.

    Args:
        module: The attention layer.
        kwargs: The keywords that its attention function was given.

    Returns:
        The cache; None without one, and where the model makes it in this call, empty.
    """
    cache = kwargs.pop(KEYWORD, None)
    if cache is not None:
        return cache
    forward = current_forward()
    if forward is not None:
        return forward.cache
    if not torch.compiler.is_compiling():
        install_cache_hook(module)  # called without its model: works from the next call on
    return None


# Stands for the layer of a cache whose keys are not those that attention was given.
UNKNOWN_LAYER = object()


def cache_layer(cache: object, module: nn.Module, key: Tensor) -> Any:
    """Find the layer of a cache by the keys that an attention layer was given.

    Its index does not tell: models store keys under other indices, in turns, or in another layer's
    place.

    Args:
        cache: The cache of the attention layer; None where it has none.
        module: The attention layer.
        key: The keys that it attends to.

    Returns:
        The layer that holds ``key``; None without a cache; `UNKNOWN_LAYER` if the model computes
        ``key`` from what the cache holds, or the cache from what it stores.
    """
    if cache is None:
        return None
    layers = cache_layers(cache)
    if layers is None:
        return None
    index = getattr(module, "layer_idx", None)
    own = layers[index] if isinstance(index, int) and index < len(layers) else None
    if own is not None and _holds(own, key):
        return own
    for layer in layers:
        if _holds(layer, key):
            return layer
    if is_offloading(cache) and not torch.compiler.is_compiling():
        for layer in layers:
            track_layer(layer)  # makes it remember, from now on, the keys that it returns
    # All updated layers of a preallocated cache are filled to the same length.
    return own if is_static(own) else UNKNOWN_LAYER


def _holds(layer: Any, key: Tensor) -> bool:
    holds = getattr(layer, "infllm_holds", None)  # a tracked layer's ``keys`` are for its users
    return getattr(layer, "keys", None) is key if holds is None else bool(holds(key))
