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

from infllm_flex.autocast import attention_dtype
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
            follow_class(layer)  # so that it remembers, from now on, what it returns
    # How far a preallocated cache is filled is the same in all layers that were updated so far.
    return own if is_static(own) else UNKNOWN_LAYER


def _holds(layer: Any, key: Tensor) -> bool:
    holds = getattr(layer, "infllm_holds", None)  # of a layer whose ``keys`` are for its users
    return getattr(layer, "keys", None) is key if holds is None else bool(holds(key))


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
        version: Count of the changes in place that ``keys`` had gone through by then; None where
            PyTorch does not count them, in inference mode.
    """

    compressed_keys: CompressedKeys
    keys: Tensor
    no_padding: Tensor
    num_slots: int = 0
    version: int | None = None

    @classmethod
    def begin(cls, config: InfLLMConfig, key: Tensor, keys: Tensor) -> State:
        """The state of a cache layer that holds ``keys``, and returned them as ``key``; empty."""
        no_padding = torch.zeros(1, dtype=torch.int64, device=key.device)
        return cls(CompressedKeys(config, key), keys, no_padding)

    def belong_to(self, keys: Tensor) -> None:
        """Note that the compressed keys are those of ``keys`` as they are now."""
        self.keys, self.version = keys, _version(keys)

    def belongs_to(self, keys: Tensor | None, changes: int = 0) -> bool:
        """Whether they are those of ``keys``, but for at most so many changes in place."""
        if self.keys is not keys:
            return False
        now = _version(self.keys)
        if now is None or self.version is None:
            return now is self.version
        return 0 <= now - self.version <= changes

    def serves(self, key: Tensor, config: InfLLMConfig) -> bool:
        """Whether they are of these settings, and of keys as cast as ``key`` is here."""
        keys = self.compressed_keys
        return keys.config == config and keys.compressed.dtype == attention_dtype(key)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as None: what it belongs to is another tensor then."""
        return type(None), ()


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _follow_dynamic(
    layer: Any, key: Tensor, start: Tensor | None, config: InfLLMConfig
) -> CompressedKeys:
    state, keys = layer.infllm_state, layer.__dict__["keys"]
    if (
        state is None
        or not state.belongs_to(keys)
        or not state.serves(key, config)
        or not _may_write(state)
    ):
        state = layer.infllm_state = State.begin(config, key, keys)
        state.belong_to(keys)
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
    compiling = torch.compiler.is_compiling()
    if state is None or state.keys is not layer.keys or not state.serves(key, config):
        from infllm_flex.patch.huggingface.static_state import begin_state

        state = begin_state(layer, key, config)
        setattr(layer, _ATTRIBUTE, state)
        num_new = key.shape[2]  # all there are
    # A call writes its new keys at once. Unseen here: changes that a user makes between two steps
    # that are compiled whole.
    elif not compiling and not state.belongs_to(layer.keys, changes=1):
        num_new = key.shape[2]
    if not compiling:
        state.belong_to(layer.keys)
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
