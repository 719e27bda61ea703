"""Decoding over a transformers cache: where the cache is found, and the state kept beside it.

transformers hands attention functions the keys of a cache, not the cache. A hook on each attention
layer passes it on. The compressed keys then live on the cache's own layers: they go where the cache
goes, two generations never share any, and no module remembers one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import CompressedKeys
from infllm_flex.patch.huggingface.instance_forward import expect_call

KEYWORD = "infllm_cache"
# What attention layers call their cache, by version and family.
_CACHE_NAMES = ("cache", "past_key_values", "layer_past", "past_key_value")
_ATTRIBUTE = "infllm_state"


def deliver_cache_to(module: nn.Module) -> None:
    """Have the attention function of ``module`` called with its cache, as ``infllm_cache``."""
    if _deliver_cache not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_deliver_cache, with_kwargs=True)


def stop_delivering_cache_to(module: nn.Module) -> None:
    """Undo `deliver_cache_to`. By the hook itself: a copied model has hooks, but no handles."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _deliver_cache:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _deliver_cache(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not torch.compiler.is_compiling() and "forward" in vars(module):
        expect_call(module)
    for name in _CACHE_NAMES:
        cache = kwargs.get(name)
        if cache is not None:
            return args, {**kwargs, KEYWORD: cache}
    return None


def cache_layer(cache: object, module: nn.Module) -> Any:
    """The layer of ``cache`` that belongs to an attention layer; None where it has none."""
    cache = getattr(cache, "self_attention_cache", cache)
    layers, index = getattr(cache, "layers", None), getattr(module, "layer_idx", None)
    return None if layers is None or index is None else layers[index]


def is_static(layer: Any) -> bool:
    """Whether a cache layer is preallocated, and its length known to the device alone."""
    return isinstance(getattr(layer, "cumulative_length", None), Tensor)


def compressed_keys_of(
    layer: Any, key: Tensor, num_new: int, start: Tensor | None, config: InfLLMConfig
) -> CompressedKeys:
    """The compressed keys of a cache layer, brought up to date with it.

    Kept and extended for the layers of dynamic and of static caches. For all others, and while a
    dynamic one is compiled, computed anew from the keys of each call: slower, and as right.

    Args:
        layer: The cache's layer, after its own update.
        key: ``[B, Hkv, S, D]``, as that returned them.
        num_new: How many of them are new.
        start: Slot of each row's first token, int64 ``[B]``; None where no row is padded.
        config: Sparsity settings.
    """
    if is_static(layer):
        return _follow_static(layer, key, num_new, start, config)
    if not torch.compiler.is_compiling() and follow_class(layer):
        return _follow_dynamic(layer, key, start, config)
    keys = CompressedKeys(config, key)
    keys.append(key, key.shape[2], start=start)
    return keys


@dataclass
class State:
    """What a cache layer carries.

    Attributes:
        compressed_keys: Of the slots taken in so far.
        keys: The tensor of keys they belong to. If the layer holds another, something changed the
            cache in a way that was not followed.
        no_padding: Zero, for where no row is padded: made once, not at every step.
        num_slots: How many are taken in; not kept for static caches.
    """

    compressed_keys: CompressedKeys
    keys: Tensor
    no_padding: Tensor
    num_slots: int = 0

    @classmethod
    def begin(cls, config: InfLLMConfig, key: Tensor, keys: Tensor) -> State:
        """The state of a cache layer that holds ``keys``, and returned them as ``key``; empty."""
        no_padding = torch.zeros(1, dtype=torch.int64, device=key.device)
        return cls(CompressedKeys(config, key), keys, no_padding)


def _follow_dynamic(
    layer: Any, key: Tensor, start: Tensor | None, config: InfLLMConfig
) -> CompressedKeys:
    state = layer.infllm_state
    if state is None or state.compressed_keys.config != config or not _may_write(state):
        state = layer.infllm_state = State.begin(config, key, layer.keys)
    start = state.no_padding if start is None else start
    state.compressed_keys.append(key, key.shape[2] - state.num_slots, start=start)
    state.num_slots = key.shape[2]
    return state.compressed_keys


def _may_write(state: State) -> bool:
    """Tensors made in inference mode may not be changed outside of it."""
    return torch.is_inference_mode_enabled() or not state.compressed_keys.end.is_inference()


def _follow_static(
    layer: Any, key: Tensor, num_new: int, start: Tensor | None, config: InfLLMConfig
) -> CompressedKeys:
    state: State | None = getattr(layer, _ATTRIBUTE, None)
    if state is None or state.keys is not layer.keys or state.compressed_keys.config != config:
        from infllm_flex.patch.huggingface.static_state import begin_state

        state = begin_state(layer, key, config)
        setattr(layer, _ATTRIBUTE, state)
        num_new = key.shape[2]  # all there are
    keys = state.compressed_keys
    start = state.no_padding if start is None else start
    keys.append(key, num_new, start=start, end=layer.cumulative_length)
    return keys


@functools.cache
def _following_layer() -> tuple[type, type]:
    """The plain dynamic layer, and the same one whose state follows what is done to it."""
    from infllm_flex.patch.huggingface.cache_layer import DynamicLayer, FollowedLayer

    return DynamicLayer, FollowedLayer


def follow_class(layer: Any) -> bool:
    """Make the state of a plain dynamic layer follow it from now on; False for other layers."""
    plain, followed = _following_layer()
    if type(layer) is plain:
        layer.__class__ = followed
    return type(layer) is followed
