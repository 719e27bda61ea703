"""Keep the compressed and coarse keys of a growing key cache up to date, in place."""

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
    """Take in the next ``num_new`` slots of a cache: count them, and write the windows made whole.

    A window has the bits that ``compress_keys`` gives it in a row of its own, of keys that were
    cast to the dtype of ``compressed``. Whole windows that end before the new slots are not
    touched, nor is anything beyond the last whole one: after a cache was cropped, the windows that
    lost a token are written again with their last one.

    Args:
        k: Cache of keys ``[B, Hkv, S, D]``, the new ones in it.
        compressed: Compressed keys ``[B, Hkv, C, D]``, with room for those of the longest row.
            Window j of row b averages the slots from ``start[b] + j * kernel_stride`` on.
        coarse: Coarse keys ``[B, Hkv, C2, D]``, alike; or None, for compressed keys only.
        start: Slot of each row's first token, int64 ``[B]``: how far it is padded on the left.
        end: One past the slot of each row's last token, int64 ``[B]``; moves on by ``num_new``.
        new_start: What ``start`` becomes, of integers, and broadcast to it; None to keep it.
        new_end: What ``end`` becomes instead, alike; how many slots are filled, the new ones
            included.
        num_new: How many slots before the new ``end`` are new.
        kernel_size: Pooling window of the compressed keys, in tokens, a multiple of the step.
        kernel_stride: Step between their windows, in tokens.
        coarse_size: Pooling window of the coarse keys, in tokens, a multiple of the step.
        coarse_stride: Step between their windows, in tokens.

    Raises:
        ValueError: The cache or its windows are too short for ``end``, on the CPU; elsewhere what
            is beyond them is left out.
    """
    if new_start is not None:
        start.copy_(new_start)
    if new_end is not None:
        end.copy_(new_end)
    else:
        end.add_(num_new)
    levels = [(compressed, kernel_size, kernel_stride)]
    if coarse is not None:
        levels.append((coarse, coarse_size, coarse_stride))
    for b, (first, last) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        if last > k.shape[2]:
            raise ValueError(f"k must hold {last} slots in row {b}, got {k.shape[2]}")
        for windows, size, stride in levels:
            begin = max(0, (last - first - num_new - size) // stride + 1)
            count = max(0, (last - first - size) // stride + 1) - begin
            if count <= 0:
                continue
            if begin + count > windows.shape[2]:
                raise ValueError(
                    f"windows must have room for {begin + count} in row {b}, got {windows.shape[2]}"
                )
            at = first + begin * stride
            tokens = k[b : b + 1, :, at : at + (count - 1) * stride + size].to(windows.dtype)
            averages = average_windows(tokens, count, size, stride)
            windows[b, :, begin : begin + count] = averages[0]


@append_windows.register_fake
def _(k: Tensor, compressed: Tensor, coarse: Tensor | None, *rest: Any) -> None:
    return None


cuda_launcher(append_windows, "selection.kernels.append_windows")
