"""Update the compressed and coarse keys of a growing key cache in place."""

from typing import Any

from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.selection.compress_keys import average_windows


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
    dtype of ``compressed``. Windows that end before the new slots are not touched, and nothing is
    written beyond the last complete window. After a cache was cropped, the windows that lost a
    token are written again when their last token is. All windows of a row whose ``start`` changes
    are written again.

    Args:
        k: Cache of keys ``[B, Hkv, S, D]`` that holds the new ones.
        compressed: Compressed keys ``[B, Hkv, C, D]``, with room for those of the longest row.
            Window j of row b averages the slots from ``start[b] + j * kernel_stride`` on.
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
        ValueError: The cache or its windows are too short for ``end``. This is checked on the CPU
            only; other devices leave out what does not fit.
    """
    starts = start.tolist()
    if new_start is not None:
        start.copy_(new_start)
    if new_end is not None:
        end.copy_(new_end)
    else:
        end.add_(num_new)
    levels = [(compressed, kernel_size, kernel_stride)]
    if coarse is not None:
        levels.append((coarse, coarse_size, coarse_stride))
    rows = zip(starts, start.tolist(), end.tolist(), strict=True)
    for b, (old_start, row_start, row_end) in enumerate(rows):
        if row_end > k.shape[2]:
            raise ValueError(f"k must hold {row_end} slots in row {b}, got {k.shape[2]}")
        length = row_end - row_start
        before = length - num_new if row_start == old_start else 0
        for windows, size, stride in levels:
            written = max(0, (before - size) // stride + 1)
            complete = max(0, (length - size) // stride + 1)
            if complete <= written:
                continue
            if complete > windows.shape[2]:
                raise ValueError(
                    f"windows must have room for {complete} in row {b}, got {windows.shape[2]}"
                )
            slot = row_start + written * stride
            end_slot = row_start + (complete - 1) * stride + size
            tokens = k[b : b + 1, :, slot:end_slot].to(windows.dtype)
            averages = average_windows(tokens, complete - written, size, stride)
            windows[b, :, written:complete] = averages[0]


@append_windows.register_fake
def _(*_: Any) -> None:
    return None


cuda_launcher(append_windows, "selection.kernels.append_windows")
