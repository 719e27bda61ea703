"""Bring the compressed keys that a cache's layer carries up to date with it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import CompressedKeys
from infllm_flex.patch.huggingface.cache_state import CacheState
from infllm_flex.patch.huggingface.transformers_private import is_static

_ATTRIBUTE = "infllm_state"


@functools.cache
def _tracked(kind: type) -> type | None:
    """The class of tracked layers for a class of layers; None where there is none."""
    from infllm_flex.patch.huggingface.cache_layer import tracked_class

    return tracked_class(kind)


def track_layer(layer: Any) -> bool:
    """Make the state of a growing layer follow every change from now on; False for other layers."""
    kind: type = type(layer)
    tracked = _tracked(kind)
    if tracked is not None and tracked is not type(layer):
        layer.__class__ = tracked
    return tracked is not None


def compressed_keys_of(
    layer: Any, key: Tensor, num_new: int, start: Tensor | None, config: InfLLMConfig
) -> CompressedKeys:
    """The compressed keys of a cache layer, brought up to date with it.

    The layers of dynamic and of static caches keep and extend them. For other layers, and for a
    dynamic layer inside a graph, they are computed anew in each call, which is slower.

    Args:
        layer: The cache's layer, after its own update.
        key: ``[B, Hkv, S, D]``, as that update returned them.
        num_new: Number of new keys among them.
        start: Slot of each row's first token, int64 ``[B]``; None where no row is padded.
        config: Sparsity settings.
    """
    if is_static(layer):
        return _update_static(layer, key, num_new, start, config)
    if not torch.compiler.is_compiling() and track_layer(layer):
        return _update_dynamic(layer, key, start, config)
    keys = CompressedKeys(config, key)
    keys.append(key, key.shape[2], start=start)
    return keys


def _update_dynamic(
    layer: Any, key: Tensor, start: Tensor | None, config: InfLLMConfig
) -> CompressedKeys:
    state, keys = layer.infllm_state, layer.__dict__["keys"]
    if (
        state is None
        or not state.is_bound_to(keys)
        or not state.serves(key, config)
        or not _may_write(state)
    ):
        state = layer.infllm_state = CacheState.begin(config, key, keys)
        state.bind(keys)
    start = state.no_padding if start is None else start
    state.compressed_keys.append(key, key.shape[2] - state.num_slots, start=start)
    state.num_slots = key.shape[2]
    return state.compressed_keys


def _may_write(state: CacheState) -> bool:
    """Whether PyTorch allows writes: tensors of inference mode are read-only outside of it."""
    return torch.is_inference_mode_enabled() or not state.compressed_keys.end.is_inference()


def _update_static(
    layer: Any, key: Tensor, num_new: int, start: Tensor | None, config: InfLLMConfig
) -> CompressedKeys:
    state: CacheState | None = getattr(layer, _ATTRIBUTE, None)
    compiling = torch.compiler.is_compiling()
    if state is None or state.keys is not layer.keys or not state.serves(key, config):
        from infllm_flex.patch.huggingface.static_state import begin_state

        state = begin_state(layer, key, config)
        setattr(layer, _ATTRIBUTE, state)
        num_new = key.shape[2]  # all there are
    # A call writes its new keys in one operation. A user's changes between two steps of a graph
    # cannot be seen.
    elif not compiling and not state.is_bound_to(layer.keys, changes=1):
        num_new = key.shape[2]
    if not compiling:
        state.bind(layer.keys)
    keys = state.compressed_keys
    start = state.no_padding if start is None else start
    keys.append(key, num_new, start=start, end=layer.cumulative_length)
    return keys
