"""Triton kernel of ``append_windows``: one program writes a few new windows of one KV head."""

import triton
import triton.language as tl
from torch import Tensor

from custom_ops.kernels.compress_keys import average_windows

_WINDOWS = 8


@triton.jit(do_not_specialize=["S", "C", "num_new"])
def _append_kernel(
    k_ptr,
    windows_ptr,
    start_ptr,
    end_ptr,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_wb,
    stride_wh,
    stride_ws,
    stride_wd,
    S,
    C,
    num_new,
    Hkv,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """Average the windows that end in the last ``num_new`` slots of a row."""
    b = tl.program_id(1) // Hkv
    h = tl.program_id(1) % Hkv
    start = tl.load(start_ptr + b)
    end = tl.load(end_ptr + b)
    ready = tl.maximum(end - start - num_new + (KERNEL_STRIDE - KERNEL_SIZE), 0) // KERNEL_STRIDE
    whole = tl.maximum(end - start + (KERNEL_STRIDE - KERNEL_SIZE), 0) // KERNEL_STRIDE
    window = ready + tl.program_id(0) * WINDOWS + tl.arange(0, WINDOWS)
    first = start + window * KERNEL_STRIDE
    is_new = (window < whole) & (window < C) & (first + KERNEL_SIZE <= S)
    d = tl.arange(0, BLOCK_D)
    mask = is_new[:, None] & (d < D)[None, :]
    column_ptr = k_ptr + b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
    column_ptr += d[None, :].to(tl.int64) * stride_kd
    mean = average_windows(
        column_ptr, first, stride_ks, mask, KERNEL_SIZE, KERNEL_STRIDE, WINDOWS, BLOCK_D
    )
    out_ptr = windows_ptr + b.to(tl.int64) * stride_wb + h.to(tl.int64) * stride_wh
    out_ptr += window[:, None] * stride_ws + d[None, :].to(tl.int64) * stride_wd
    tl.store(out_ptr, mean, mask=mask)


def launch(
    k: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    start: Tensor,
    end: Tensor,
    num_new: int,
    kernel_size: int,
    kernel_stride: int,
    coarse_size: int,
    coarse_stride: int,
) -> None:
    """Write the windows of both levels that the new slots made whole."""
    levels = [(compressed, kernel_size, kernel_stride)]
    if coarse is not None:
        levels.append((coarse, coarse_size, coarse_stride))
    B, Hkv, S, D = k.shape
    for windows, size, stride in levels:
        most = min(num_new // stride + 1, windows.shape[2])
        if not most or not k.numel():
            continue
        _append_kernel[(triton.cdiv(most, _WINDOWS), B * Hkv)](
            k,
            windows,
            start,
            end,
            *k.stride(),
            *windows.stride(),
            S,
            windows.shape[2],
            num_new,
            Hkv,
            size,
            stride,
            D,
            triton.next_power_of_2(D),
            _WINDOWS,
            num_warps=8,
        )
