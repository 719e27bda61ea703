"""A dynamic cache layer that takes its compressed keys along. Imports transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

__all__ = ["DynamicLayer", "FollowedLayer"]

_LEAST_ROOM = 64  # tokens


class FollowedLayer(DynamicLayer):
    """`DynamicLayer`, made of one by assigning its class, so that whoever holds it holds this.

    A change of ``keys`` that went past these methods is noticed by the tensor being another: the
    compressed keys are then computed anew at the next step.

    Attributes:
        infllm_state: The compressed keys and what they belong to; None until the first sparse step.
    """

    infllm_state: Any = None
    _key_room: Tensor | None = None
    _value_room: Tensor | None = None

    @contextmanager
    def _following(self) -> Iterator[Any]:
        """Change the keys inside the block; the state is there to be changed alike, or None."""
        state = self.infllm_state
        if state is not None and state.keys is not self.keys:
            self.infllm_state = state = None
        yield state
        if state is not None:
            state.keys = self.keys

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values in place; the compressed keys catch up when attention asks.

        `DynamicLayer` copies all it holds with every token, at long lengths more work than the
        attention. Here what it holds is the beginning of a larger tensor.
        """
        with self._following():
            if torch.is_grad_enabled() or self.keys is None or self.values is None:
                return super().update(key_states, value_states, *args, **kwargs)
            self.keys, self._key_room = _extend(self.keys, key_states, self._key_room)
            self.values, self._value_room = _extend(self.values, value_states, self._value_room)
            return self.keys, self.values

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove the last tokens."""
        with self._following() as state:
            super().crop(*args, **kwargs)
            if state is not None:
                kept = min(state.num_slots, self.get_seq_length())
                state.compressed_keys.crop(state.num_slots - kept)
                state.num_slots = kept

    def reorder_cache(self, beam_idx: Any) -> None:
        """Permute the rows of the batch."""
        with self._following() as state:
            super().reorder_cache(beam_idx)
            if state is not None:
                state.compressed_keys.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, next to itself."""
        with self._following() as state:
            super().batch_repeat_interleave(repeats)
            if state is not None:
                state.compressed_keys.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        with self._following() as state:
            super().batch_select_indices(indices)
            if state is not None:
                state.compressed_keys.select(indices)

    def offload(self) -> None:
        """Move keys and values to the CPU; the compressed keys, a twentieth of them, stay."""
        self._key_room = self._value_room = None
        with self._following():
            super().offload()

    def prefetch(self) -> None:
        """Move keys and values back."""
        with self._following():
            super().prefetch()

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.infllm_state = self._key_room = self._value_room = None


def _extend(held: Tensor, new: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor]:
    """Write ``new`` behind ``held``, both ``[B, H, _, D]``: all together, and the tensor it is in.

    Args:
        held: What there is: the beginning of ``room``, or something else.
        new: What follows.
        room: A longer tensor, or None.
    """
    length = held.shape[2] + new.shape[2]
    fits = (
        room is not None
        and held.data_ptr() == room.data_ptr()
        and held.stride() == room.stride()
        and held.shape[:2] == room.shape[:2]
        and length <= room.shape[2]
        and room.is_inference() == held.is_inference() == torch.is_inference_mode_enabled()
    )
    if room is None or not fits:
        B, H, S, D = held.shape
        room = held.new_empty(B, H, length + max(_LEAST_ROOM, length // 8), D)
        room[:, :, :S] = held
    room[:, :, held.shape[2] : length] = new
    return room[:, :, :length], room
