"""The compressed and coarse keys of a key cache, kept beside it while it grows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import infllm_flex_ops
from infllm_flex.autocast import attention_dtype
from infllm_flex.config import InfLLMConfig
from infllm_flex_ops.dispatch import skip_dispatcher
from infllm_flex_ops.selection.compress_keys import num_windows
from infllm_flex_ops.selection.rule import COLUMNS

# Products over the windows are as wide as a whole tile of queries sees, which may end so many
# tokens after the last one, and take whole groups of columns.
_SLACK_TOKENS = 512


class CompressedKeys:
    """Compressed and coarse keys of a cache ``[B, Hkv, S, D]``, by row from its own first token.

    Allocated once per capacity and written in place; all that depends on lengths is on the device,
    so that a compiled graph serves every step. After any operation the whole windows have the bits
    that compressing the cache from scratch would give. Made inside an autocast region, they are of
    the keys cast as attention casts them there; the cache itself is not cast.

    Args:
        config: Sparsity settings.
        key: The cache of keys, ``[B, Hkv, S, D]``, for its shape, dtype and device; no token of it
            is taken in yet.

    Attributes:
        config: Sparsity settings.
        capacity: Slots of the longest cache that the windows have room for.
        compressed: ``[B, Hkv, C, D]``; the first windows count, as many as a row's length makes
            whole. C is 0 where the cache's own keys are scored.
        coarse: ``[B, Hkv, C2, D]``, alike; ``compressed`` itself where it plays no part.
        start: Slot of each row's first token, int64 ``[B]``.
        end: One past the slot of each row's last token, int64 ``[B]``.
    """

    def __init__(self, config: InfLLMConfig, key: Tensor) -> None:
        self.config = config
        self.capacity = key.shape[2]
        self._key_dtype = key.dtype
        if self.scores_keys:
            shape = (*key.shape[:2], 0, key.shape[3])
            self.compressed = key.new_empty(shape, dtype=attention_dtype(key))
        else:
            self.compressed = _allocate(key, config.kernel_size, config.kernel_stride)
        self.coarse = self.compressed
        if config.lse == "coarse" and not config.pool_queries:
            self.coarse = _allocate(key, config.coarse_size, config.coarse_stride)
        self.start = torch.zeros(key.shape[0], dtype=torch.int64, device=key.device)
        self.end = torch.zeros_like(self.start)

    @property
    def scores_keys(self) -> bool:
        """Whether blocks are chosen by the cache's own keys, of which nothing is kept here."""
        return self.config.pool_queries and self.config.kernel_size == 1

    @torch.no_grad()
    def append(
        self,
        key: Tensor,
        num_new: int,
        *,
        start: Tensor | None = None,
        end: Tensor | None = None,
    ) -> None:
        """Take in the next ``num_new`` slots of a cache, those after the ones taken in so far.

        Args:
            key: The cache ``[B, Hkv, S, D]``, with the new keys in it; longer than what is taken in
                where it is preallocated.
            num_new: How many slots follow, 0 or more, the same in all rows.
            start: Slot of each row's first token, ``[B]``, where rows are padded on the left; kept
                by default. As given before, or larger while a row was nothing but padding.
            end: How many slots are filled, the new ones included, of any shape that broadcasts to
                ``[B]``; by default those so far and the new ones.

        Raises:
            ValueError: ``key`` has not the shape, dtype or device of the cache so far.
        """
        self._make_room(key)
        if self.scores_keys:
            self._count(num_new, start, end)
            return
        key = key.detach()
        skip_dispatcher(infllm_flex_ops.append_windows, key)(
            key,
            self.compressed,
            None if self.coarse is self.compressed else self.coarse,
            self.start,
            self.end,
            start,
            end,
            num_new,
            self.config.kernel_size,
            self.config.kernel_stride,
            self.config.coarse_size,
            self.config.coarse_stride,
        )

    def _count(self, num_new: int, start: Tensor | None, end: Tensor | None) -> None:
        """Note where rows begin and end now."""
        if start is not None:
            self.start.copy_(start)
        if end is not None:
            self.end.copy_(end)
        else:
            self.end.add_(num_new)

    def _make_room(self, key: Tensor) -> None:
        """Let the windows of a cache as long as ``key`` fit."""
        have, config = self.compressed, self.config
        B, Hkv, S, D = key.shape
        if (B, Hkv, D) != (have.shape[0], have.shape[1], have.shape[3]) or (
            key.dtype != self._key_dtype or key.device != have.device
        ):
            raise ValueError(
                f"key must be [{have.shape[0]}, {have.shape[1]}, S, {have.shape[3]}], "
                f"{self._key_dtype}, on {have.device} as before, got {tuple(key.shape)}, "
                f"{key.dtype}, on {key.device}"
            )
        if self.capacity >= S:
            return
        # So that a cache that grows token by token is copied seldom.
        self.capacity = max(S + _SLACK_TOKENS, self.capacity * 3 // 2)
        if self.scores_keys:
            return
        is_exact = self.coarse is self.compressed
        sizes = config.kernel_size, config.kernel_stride
        self.compressed = _lengthen(self.compressed, self.capacity, *sizes)
        if is_exact:
            self.coarse = self.compressed
        else:
            sizes = config.coarse_size, config.coarse_stride
            self.coarse = _lengthen(self.coarse, self.capacity, *sizes)

    def crop(self, num_removed: int) -> None:
        """Forget the last ``num_removed`` slots; their windows are written anew with their like."""
        self.end.sub_(num_removed).clamp_(min=0)

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.start.zero_()
        self.end.zero_()

    def select(self, rows: Tensor) -> None:
        """Make row ``rows[i]`` the i-th, to reorder beams or to drop rows: any index of rows."""
        self._replace(lambda x: x[rows.to(x.device)])

    def repeat(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, next to itself."""
        self._replace(lambda x: x.repeat_interleave(repeats, dim=0))

    def to(self, device: torch.device | str) -> None:
        """Move to another device, and back."""
        self._replace(lambda x: x.to(device))

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        is_exact = self.coarse is self.compressed
        self.compressed = change(self.compressed)
        self.coarse = self.compressed if is_exact else change(self.coarse)
        self.start, self.end = change(self.start), change(self.end)


def _num_slots(S: int, size: int, stride: int) -> int:
    return -(-num_windows(S + _SLACK_TOKENS, size, stride) // COLUMNS) * COLUMNS


def _allocate(key: Tensor, size: int, stride: int) -> Tensor:
    B, Hkv, S, D = key.shape
    shape = (B, Hkv, _num_slots(S, size, stride), D)
    return key.new_zeros(shape, dtype=attention_dtype(key))


def _lengthen(windows: Tensor, capacity: int, size: int, stride: int) -> Tensor:
    return F.pad(windows, (0, 0, 0, _num_slots(capacity, size, stride) - windows.shape[2]))
