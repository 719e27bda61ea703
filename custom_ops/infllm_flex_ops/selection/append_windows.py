"""Update the compressed and coarse keys of a growing key cache in place."""

from typing import Any

import torch
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.rows import next_rows
from infllm_flex_ops.selection.compress_keys import average_windows
from infllm_flex_ops.selection.pool_queries import round_to_float8
from infllm_flex_ops.selection.rotary_dims import slowest_dims
from infllm_flex_ops.selection.rule import Windows


@define_operator(mutates_args=("compressed", "coarse", "start", "end"))
def append_windows(
    k: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    start: Tensor,
    end: Tensor,
    new_start: Tensor | None,
    new_end: Tensor | None,
    num_new: int,
    kernel_size: int,
    kernel_stride: int,
    coarse_size: int,
    coarse_stride: int,
) -> None:
    """Append the next ``num_new`` slots of a cache: count them and write the completed windows.

    A window has the bits that ``compress_keys`` gives it in a row of its own, of keys cast to the
    dtype of ``compressed``; for e4m3 they are not cast, and the window is rounded to it at last.
    Windows that end before the new slots are not touched, and nothing is written beyond the last
    complete window. After a cache was cropped, the windows that lost a token are written again when
    their last token is. All windows of a row whose ``start`` changes are written again.

    Args:
        k: Cache of keys ``[B, Hkv, S, D]`` that holds the new ones.
        compressed: Compressed keys ``[B, Hkv, C, num_dims]``, with room for those of the longest
            row: of all D head dims, or of those that a rotary embedding turns slowest. Window j of
            row b averages the slots from ``start[b] + j * kernel_stride`` on.
        coarse: Coarse keys ``[B, Hkv, C2, D]`` in the same layout; None for compressed keys only.
        start: Slot of each row's first token, int64 ``[B]``: the row's padding on the left.
        end: One past the slot of each row's last token, int64 ``[B]``; grows by ``num_new``.
        new_start: New value of ``start``, integers that broadcast to it; None to keep it.
        new_end: New value of ``end``, integers that broadcast to it: the number of filled slots,
            the new ones included. None to add ``num_new``.
        num_new: Number of new slots before the new ``end``.
        kernel_size: Pooling window of the compressed keys, in tokens, a multiple of the step.
        kernel_stride: Step between their windows, in tokens.
        coarse_size: Pooling window of the coarse keys, in tokens, a multiple of the step.
        coarse_stride: Step between their windows, in tokens.

    Raises:
        ValueError: The cache or its windows are too short for ``end``, or a row begins before the
            cache. This is checked on the CPU only, and nothing is then written; other devices leave
            out what does not fit.
    """
    old_starts = start.tolist()
    levels = [(compressed, Windows(kernel_size, kernel_stride))]
    if coarse is not None:
        levels.append((coarse, Windows(coarse_size, coarse_stride)))
    rows = next_rows(start, end, new_start, new_end, num_new, k.shape[2])
    for b, (row_start, row_end) in enumerate(rows):
        for averages, windows in levels:
            complete = windows.num_visible(row_end - row_start - 1)
            if complete > averages.shape[2]:
                raise ValueError(
                    f"windows must have room for {complete} in row {b}, got {averages.shape[2]}"
                )
    # Nothing is written before all checks, so that the next append finds the rows as they were.
    start.copy_(torch.tensor([row_start for row_start, _ in rows]))
    end.copy_(torch.tensor([row_end for _, row_end in rows]))
    for b, (row_start, row_end) in enumerate(rows):
        last = row_end - row_start - 1
        before = last - num_new if row_start == old_starts[b] else -1
        for averages, windows in levels:
            written, complete = windows.num_visible(before), windows.num_visible(last)
            if complete <= written:
                continue
            slot = row_start + written * windows.stride
            end_slot = row_start + (complete - 1) * windows.stride + windows.size
            tokens = k[b : b + 1, :, slot:end_slot]
            found = average_slowest(tokens, complete - written, windows, averages)
            averages[b, :, written:complete] = found[0]


def average_slowest(tokens: Tensor, count: int, windows: Windows, like: Tensor) -> Tensor:
    """Average windows of ``tokens [B, Hkv, S, D]``, in the dims and the dtype of ``like``.

    Returns:
        ``[B, Hkv, count, num_dims]``.
    """
    tokens = slowest_dims(tokens, like.shape[-1])
    if like.dtype != torch.float8_e4m3fn:
        return average_windows(tokens.to(like.dtype), count, *windows)
    return round_to_float8(average_windows(tokens, count, *windows))


@append_windows.register_fake
def _(*_: Any) -> None:
    return None


cuda_launcher(append_windows, "selection.kernels.append_windows")
