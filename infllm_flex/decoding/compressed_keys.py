"""The compressed and coarse keys of a key cache, kept beside it while it grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

import infllm_flex_ops
from infllm_flex.autocast import attention_dtype
from infllm_flex.config import InfLLMConfig
from infllm_flex.selection import dtype_of_compressed, selection_rule
from infllm_flex_ops.dispatch import is_plain_on_cpu, skip_dispatcher, without_grad
from infllm_flex_ops.rows import next_rows
from infllm_flex_ops.selection.compress_keys import num_windows
from infllm_flex_ops.selection.rule import COLUMNS
from infllm_flex_ops.sizes import ceil_div

# Score products cover all windows that a tile of queries may see. The tile may end this many tokens
# after the last one.
_SLACK_TOKENS = 512


class CompressedKeys:
    """Compressed and coarse keys of a cache ``[B, Hkv, S, D]``.

    The windows of a row count from its first token. Memory is allocated once per capacity and
    written in place. Lengths are tensors on the device, so that one compiled graph serves every
    step. After any operation the whole windows have the bits that compressing the cache from
    scratch gives. Inside an autocast region keys are cast as attention casts them before they are
    compressed; the cache itself is not cast.

    Args:
        config: Sparsity settings.
        key: The cache of keys, ``[B, Hkv, S, D]``, for its shape, dtype and device; none of its
            tokens is compressed yet.

    Raises:
        ValueError: ``key`` is not floating point of four dimensions, or its heads have no more dims
            than ``score_dims``.

    Attributes:
        config: Sparsity settings.
        rule: Those of the selection, as the operators take them.
        capacity: Slots of the longest cache for which memory is allocated.
        head_dim: Head dim ``D`` of the cache.
        compressed: ``[B, Hkv, C, D]``, of which the first windows are valid, as many as the length
            of a row makes whole. C is 0 if the keys of the cache themselves are scored. With
            ``score_dims`` ``[B, Hkv, C, score_dims]``, in float8 where they are multiplied so.
        coarse: ``[B, Hkv, C2, D]``, likewise; ``compressed`` itself if coarse keys are not used.
        start: Slot of each row's first token, int64 ``[B]``.
        end: One past the slot of each row's last token, int64 ``[B]``.
    """

    def __init__(self, config: InfLLMConfig, key: Tensor) -> None:
        if key.dim() != 4 or not key.is_floating_point():
            raise ValueError(
                f"key must be floating point [B, Hkv, S, D], got {key.dtype} of shape "
                f"{tuple(key.shape)}"
            )
        self.config, self.head_dim = config, key.shape[3]
        self.rule = selection_rule(config)
        fine = config.kernel_size, config.kernel_stride
        self._sizes = (*fine, config.coarse_size, config.coarse_stride)
        self.capacity = key.shape[2]
        self._key_dtype = key.dtype
        if self.scores_keys:
            shape = (*key.shape[:2], 0, key.shape[3])
            self.compressed = key.new_empty(shape, dtype=attention_dtype(key))
        else:
            dims = config.num_score_dims(self.head_dim)
            self.compressed = _allocate(
                key[..., :dims], *fine, dtype=dtype_of_compressed(key, config)
            )
        self.coarse = self.compressed
        if config.uses_coarse_keys:
            coarse = config.coarse_size, config.coarse_stride
            self.coarse = _allocate(key, *coarse, dtype=attention_dtype(key))
        self.start = torch.zeros(key.shape[0], dtype=torch.int64, device=key.device)
        self.end = torch.zeros_like(self.start)

    @property
    def scores_keys(self) -> bool:
        """Whether the keys of the cache themselves are scored; nothing is then compressed here."""
        return self.config.scores_keys

    @without_grad
    def append(
        self,
        key: Tensor,
        num_new: int,
        *,
        start: Tensor | None = None,
        end: Tensor | None = None,
    ) -> None:
        """Compress the next ``num_new`` slots of a cache, after those appended so far.

        Args:
            key: The cache ``[B, Hkv, S, D]``, with the new keys in it. A preallocated cache is
                longer than the slots appended.
            num_new: New slots, from 0 to S, the same in all rows.
            start: Slot of each row's first token, ``[B]``, for rows padded on the left. None keeps
                the last value. A row whose value changes is compressed anew.
            end: Filled slots, the new ones included, of any shape that broadcasts to ``[B]``. None
                adds ``num_new`` to the last value.

        Raises:
            ValueError: ``key`` differs from the cache so far in shape, dtype or device, or has
                fewer than ``num_new`` slots. Where reading does not wait for a device, also for a
                ``start`` or ``end`` outside of the cache. Nothing is then changed.
        """
        if key.dtype != self._key_dtype:
            self._refuse(key)
        self.check_key(key)
        if not 0 <= num_new <= key.shape[2]:
            raise ValueError(f"num_new must be from 0 to S = {key.shape[2]}, got {num_new}")
        self._make_room(key)
        if self.scores_keys:
            self._count(num_new, start, end, key)
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
            *self._sizes,
        )

    def check_key(self, key: Tensor) -> None:
        """Raise a ValueError unless ``key`` has the rows, heads, head dim and device of the cache.

        Its dtype may be another than that of the keys that were compressed.
        """
        have = self.compressed
        if (
            key.dim() != 4
            or (key.shape[:2], key.shape[3]) != (have.shape[:2], self.head_dim)
            or key.device != have.device
        ):
            self._refuse(key)

    def _refuse(self, key: Tensor) -> NoReturn:
        (B, Hkv), device = self.compressed.shape[:2], self.compressed.device
        raise ValueError(
            f"key must be [{B}, {Hkv}, S, {self.head_dim}], {self._key_dtype}, on {device} as "
            f"before, got {tuple(key.shape)}, {key.dtype}, on {key.device}"
        )

    def _count(self, num_new: int, start: Tensor | None, end: Tensor | None, key: Tensor) -> None:
        """Update where rows begin and end."""
        if is_plain_on_cpu(self.end):
            next_rows(self.start, self.end, start, end, num_new, key.shape[2])
        if start is not None:
            self.start.copy_(start)
        if end is not None:
            self.end.copy_(end)
        else:
            self.end.add_(num_new)

    def _make_room(self, key: Tensor) -> None:
        """Allocate memory for the windows of a cache as long as ``key``."""
        config, S = self.config, key.shape[2]
        if self.capacity >= S:
            return
        # Growth by half makes a cache that grows token by token copy its windows rarely.
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
        """Remove the last ``num_removed`` slots; later slots overwrite their windows.

        Raises:
            ValueError: ``num_removed`` is negative.
        """
        if num_removed < 0:
            raise ValueError(f"num_removed must be 0 or more, got {num_removed}")
        self.end.sub_(num_removed).clamp_(min=0)

    def reset(self) -> None:
        """Remove all tokens; the memory stays allocated."""
        self.start.zero_()
        self.end.zero_()

    def select(self, rows: Tensor) -> None:
        """Index the rows by ``rows``, to reorder beams or to drop rows."""
        self._replace(lambda x: x[rows.to(x.device)])

    def repeat(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, next to itself."""
        self._replace(lambda x: x.repeat_interleave(repeats, dim=0))

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        self._replace(lambda x: x.to(device))

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        is_exact = self.coarse is self.compressed
        if self.compressed.element_size() == 1:  # float8, which few of PyTorch's operations know
            dtype = self.compressed.dtype
            self.compressed = change(self.compressed.view(torch.uint8)).view(dtype)
        else:
            self.compressed = change(self.compressed)
        self.coarse = self.compressed if is_exact else change(self.coarse)
        self.start, self.end = change(self.start), change(self.end)


def _num_slots(S: int, size: int, stride: int) -> int:
    # Score products take whole groups of columns.
    return ceil_div(num_windows(S + _SLACK_TOKENS, size, stride), COLUMNS) * COLUMNS


def _allocate(key: Tensor, size: int, stride: int, dtype: torch.dtype) -> Tensor:
    B, Hkv, S, D = key.shape
    return key.new_zeros((B, Hkv, _num_slots(S, size, stride), D), dtype=dtype)


def _lengthen(windows: Tensor, capacity: int, size: int, stride: int) -> Tensor:
    B, Hkv, C, D = windows.shape
    longer = windows.new_zeros(B, Hkv, _num_slots(capacity, size, stride), D)
    longer[:, :, :C] = windows
    return longer
