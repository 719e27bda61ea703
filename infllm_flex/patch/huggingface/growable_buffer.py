"""Memory in which the keys or values of a cache layer grow without being copied."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 64  # tokens


class GrowableBuffer:
    """A tensor whose beginning is what one cache layer holds, and whose end is free.

    Slots that were handed out are not written again while anyone else holds a tensor of this
    memory. Whoever holds a tensor that is not the last one that was made here gets a new room.

    Attributes:
        held: What the layer holds: ``[B, H, S, D]``, the beginning of the memory.
    """

    def __init__(self, held: Tensor, length: int) -> None:
        B, H, S, D = held.shape
        self._size = length + max(_LEAST, length // 8)
        self._memory = held.new_empty(B, H, self._size, D)
        self._memory[:, :, :S] = held
        self._filled = S
        self.held = self._memory[:, :, :S]

    @classmethod
    def extend(cls, room: GrowableBuffer | None, held: Tensor, new: Tensor) -> GrowableBuffer:
        """Put ``new`` behind ``held``: in their room if it may be written, else in a new one."""
        begin = held.shape[2]
        length = begin + new.shape[2]
        if room is None or room.held is not held or not room._may_take(length):
            room = cls(held, length)
        room._memory[:, :, begin:length] = new
        room._filled = length
        room.held = room._memory[:, :, :length]
        return room

    def _may_take(self, length: int) -> bool:
        if length > self._size:
            return False
        # Tensors made in inference mode may not be changed outside of it.
        if self._memory.is_inference() != torch.is_inference_mode_enabled():
            return False
        return self.held.shape[2] == self._filled or self._is_unshared()

    def _is_unshared(self) -> bool:
        """Whether no tensor but ours uses the memory, so that a cropped end may be overwritten."""
        count = getattr(torch._C, "_storage_Use_Count", None)  # private: without it, we copy
        storage = self._memory.untyped_storage()
        return count is not None and count(storage._cdata) <= 3  # memory, held and this storage


def can_extend(held: Tensor, new: Tensor) -> bool:
    """Whether concatenation would only append: dtype, device and other sizes are the same."""
    if held.dtype != new.dtype or held.device != new.device or held.dim() != 4:
        return False
    B, H, _, D = held.shape
    return new.dim() == 4 and new.shape == (B, H, new.shape[2], D)
