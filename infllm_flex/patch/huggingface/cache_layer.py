"""A dynamic cache layer that keeps its compressed keys up to date. Imports transformers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from infllm_flex.patch.huggingface.growable_buffer import GrowableBuffer, can_extend
from infllm_flex.patch.huggingface.transformers_private import (
    growing_layer_class,
    hybrid_layer_class,
)

__all__ = ["TrackedDynamicLayer", "tracked_class"]

_OURS = ("infllm_state", "_key_buffer", "_value_buffer", "_returned")


class TrackedDynamicLayer(DynamicLayer):
    """A `DynamicLayer` whose class was replaced in place, so that everyone who holds it has this.

    Keys and values grow in place, in buffers that only this layer writes. Code that reads ``keys``
    or ``values`` gets a tensor of its own, as from `DynamicLayer`: contiguous, alone in its memory,
    and never written by the layer. The next token then costs a copy, as it always does there.
    Copies and pickles are plain layers.

    The compressed keys belong to one tensor of keys. After other code has read ``keys``, which it
    may have changed, or has set them, they are computed anew at the next sparse step.

    Attributes:
        infllm_state: The compressed keys, as a `CacheState`; None until the first sparse step.
    """

    infllm_state: Any = None
    _plain_class: type[DynamicLayer] = DynamicLayer
    _key_buffer: GrowableBuffer | None = None
    _value_buffer: GrowableBuffer | None = None
    _returned: weakref.ref[Tensor] | None = None

    @property
    def keys(self) -> Tensor | None:
        """The keys so far, ``[B, Hkv, S, D]``, to keep or to change."""
        self.infllm_state = None
        if self._key_buffer is not None:
            self.__dict__["keys"] = _own(self.__dict__["keys"])
            self._key_buffer = None
        return self.__dict__["keys"]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self.infllm_state = self._key_buffer = None
        self.__dict__["keys"] = keys

    @property
    def values(self) -> Tensor | None:
        """The values so far, ``[B, Hkv, S, D]``, to keep or to change."""
        if self._value_buffer is not None:
            self.__dict__["values"] = _own(self.__dict__["values"])
            self._value_buffer = None
        return self.__dict__["values"]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._value_buffer = None
        self.__dict__["values"] = values

    def infllm_holds(self, key: Tensor) -> bool:
        """Whether ``key`` is the layer's tensor, or the one that it returned before offloading."""
        returned = self._returned
        return self.__dict__["keys"] is key or (returned is not None and returned() is key)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values in place; the compressed keys catch up when attention asks.

        `DynamicLayer` copies all keys and values with every token. At long lengths that is more
        work than the attention.
        """
        if torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        held = self.__dict__
        keys, values = held["keys"], held["values"]
        grows = keys is not None and values is not None and not torch.is_grad_enabled()
        if not grows or not can_extend(keys, key_states) or not can_extend(values, value_states):
            with self._tracking():
                return self._plain().update(key_states, value_states, *args, **kwargs)
        state = self._current_state()
        self._key_buffer = GrowableBuffer.extend(self._key_buffer, keys, key_states)
        self._value_buffer = GrowableBuffer.extend(self._value_buffer, values, value_states)
        held["keys"], held["values"] = self._key_buffer.held, self._value_buffer.held
        if state is not None:
            state.bind(held["keys"])
        return held["keys"], held["values"]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        keys = self.__dict__["keys"]
        return 0 if keys is None or not keys.numel() else int(keys.shape[-2])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove the last tokens."""
        buffers = self._key_buffer, self._value_buffer
        with self._tracking() as state:
            self._plain().crop(*args, **kwargs)
            if state is not None:
                kept = min(state.num_slots, self.get_seq_length())
                state.compressed_keys.crop(state.num_slots - kept)
                state.num_slots = kept
        self._key_buffer, self._value_buffer = buffers
        for buffer, name in zip(buffers, ("keys", "values"), strict=True):
            if buffer is not None:
                buffer.held = self.__dict__[name]

    def reorder_cache(self, beam_idx: Any) -> None:
        """Permute the rows of the batch."""
        with self._tracking() as state:
            self._plain().reorder_cache(beam_idx)
            if state is not None:
                state.compressed_keys.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, next to itself."""
        with self._tracking() as state:
            self._plain().batch_repeat_interleave(repeats)
            if state is not None:
                state.compressed_keys.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        with self._tracking() as state:
            self._plain().batch_select_indices(indices)
            if state is not None:
                state.compressed_keys.select(indices)

    def offload(self) -> None:
        """Move keys and values to the CPU; the compressed keys, which are small, stay."""
        keys = self.__dict__["keys"]
        self._returned = None if keys is None else weakref.ref(keys)
        with self._tracking():
            self._plain().offload()

    def prefetch(self) -> None:
        """Move keys and values back."""
        with self._tracking():
            self._plain().prefetch()

    def reset(self) -> None:
        """Forget all tokens."""
        self._plain().reset()
        self.infllm_state = self._key_buffer = self._value_buffer = self._returned = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as a plain layer, with keys and values that share no memory."""
        _ = self.keys, self.values
        plain = object.__new__(self._plain_class)
        plain.__dict__ = {name: x for name, x in self.__dict__.items() if name not in _OURS}
        return plain.__reduce_ex__(1)  # later protocols check the class of the object

    def _plain(self) -> DynamicLayer:
        """A plain layer that shares this layer's attributes."""
        plain = object.__new__(self._plain_class)
        plain.__dict__ = self.__dict__
        return plain

    def _current_state(self) -> Any:
        """The state, if it belongs to the layer's keys; else drop it and return None."""
        state = self.infllm_state
        if state is not None and not state.is_bound_to(self.__dict__["keys"]):
            self.infllm_state = state = None
        return state

    @contextmanager
    def _tracking(self) -> Iterator[Any]:
        """Let the block replace keys and values, and change the state in the same way."""
        state = self._current_state()
        self._key_buffer = self._value_buffer = None
        yield state
        if state is not None:
            state.bind(self.__dict__["keys"])


def _own(held: Tensor) -> Tensor:
    return held.clone(memory_format=torch.contiguous_format)


def tracked_class(kind: type) -> type | None:
    """The tracked class for a class of layers; None where the keys do more than grow.

    The class for hybrid layers, which hold a recurrent state beside keys and values, is made here.
    """
    if issubclass(kind, TrackedDynamicLayer):
        return kind
    if kind is growing_layer_class():
        return TrackedDynamicLayer
    if kind is hybrid_layer_class():
        return type("TrackedHybridLayer", (TrackedDynamicLayer, kind), {"_plain_class": kind})
    return None
