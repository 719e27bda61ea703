"""Memory in which the keys or values of a cache layer grow without being copied."""

from __future__ import annotations

import torch
from torch import Tensor

from infllm_flex_ops import torch_private

_LEAST = 64  # tokens


class GrowableBuffer:
    """A tensor whose beginning is what one cache layer holds, and whose end is free.

    Slots that were handed out are not written again while anyone else holds a tensor of this
    memory. A layer that holds another tensor than the last one made here gets a new buffer.

    Attributes:
        held: The layer's tensor ``[B, H, S, D]``, the beginning of the memory.
    """

    def __init__(self, held: Tensor, length: int) -> None:
        B, H, S, D = held.shape
        self._size = length + max(_LEAST, length // 8)
        self._memory = held.new_empty(B, H, self._size, D)
        self._memory[:, :, :S] = held
        self._filled = S
        self.held = self._memory[:, :, :S]

    @classmethod
    def extend(cls, buffer: GrowableBuffer | None, held: Tensor, new: Tensor) -> GrowableBuffer:
        """Append ``new`` to ``held``: in their buffer if it may be written, else in a new one."""
        begin = held.shape[2]
        length = begin + new.shape[2]
        if buffer is None or buffer.held is not held or not buffer._may_take(length):
            buffer = cls(held, length)
        buffer._memory[:, :, begin:length] = new
        buffer._filled = length
        buffer.held = buffer._memory[:, :, :length]
        return buffer

    def _may_take(self, length: int) -> bool:
        if length > self._size:
            return False
        # PyTorch forbids writes to tensors of inference mode outside of it.
        if self._memory.is_inference() != torch.is_inference_mode_enabled():
            return False
        return self.held.shape[2] == self._filled or self._is_unshared()

    def _is_unshared(self) -> bool:
        """Whether no tensor but ours uses the memory, so that a cropped end may be overwritten."""
        users = torch_private.memory_users(self._memory)
        return users is not None and users <= 2  # the memory itself, and what is held


def can_extend(held: Tensor, new: Tensor) -> bool:
    """Whether concatenation would only append: dtype, device and other sizes are the same."""
    if held.dtype != new.dtype or held.device != new.device or held.dim() != 4:
        return False
    B, H, _, D = held.shape
    return new.dim() == 4 and new.shape == (B, H, new.shape[2], D)
