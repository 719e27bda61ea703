"""Triton kernel of ``append_windows``: new windows of both levels and a row's counters, at once.

A step of generation appends one token, and most steps make no window whole: what they take is one
launch. So the counters move inside of it, and a program serves a row with all its KV heads.
"""

import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.selection.kernels.compress_keys import average_windows

_WINDOWS = 8


@triton.jit
def _write_windows(
    k_ptr,
    windows_ptr,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_wh,
    stride_ws,
    stride_wd,
    start,
    end,
    S,
    C,
    num_new,
    Hkv,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """Average the windows of a row that end in its last ``num_new`` slots, of all KV heads."""
    ready = (tl.maximum(end - start - num_new + (STRIDE - SIZE), 0) // STRIDE).to(tl.int32)
    whole = (tl.maximum(end - start + (STRIDE - SIZE), 0) // STRIDE).to(tl.int32)
    count = (tl.minimum(whole, C) - ready) * Hkv
    d = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    for begin in range(tl.program_id(0) * WINDOWS, count, tl.num_programs(0) * WINDOWS):
        i = begin + tl.arange(0, WINDOWS)
        window = (ready + i // Hkv).to(tl.int64)
        head = (i % Hkv)[:, None].to(tl.int64)
        first = start + window * STRIDE
        mask = ((i < count) & (first + SIZE <= S))[:, None] & (d < D)
        column_ptr = k_ptr + head * stride_kh + d * stride_kd
        mean = average_windows(
            column_ptr,
            first,
            stride_ks,
            mask,
            windows_ptr.dtype.element_ty,
            SIZE,
            STRIDE,
            WINDOWS,
            BLOCK_D,
        )
        out_ptr = windows_ptr + head * stride_wh + window[:, None] * stride_ws + d * stride_wd
        tl.store(out_ptr, mean, mask=mask)


@triton.jit(do_not_specialize=["S", "C", "C2", "num_new", "stride_start", "stride_end"])
def _append_kernel(
    k_ptr,
    compressed_ptr,
    coarse_ptr,
    start_ptr,
    end_ptr,
    new_start_ptr,
    new_end_ptr,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_wb,
    stride_wh,
    stride_ws,
    stride_wd,
    stride_cb,
    stride_ch,
    stride_cs,
    stride_cd,
    stride_start,
    stride_end,
    S,
    C,
    C2,
    num_new,
    Hkv,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    COARSE_SIZE: tl.constexpr,
    COARSE_STRIDE: tl.constexpr,
    HAS_COARSE: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_END: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """Serve a row: alone where its ``end`` is to be moved on, for nobody else must read it."""
    b = tl.program_id(1).to(tl.int64)
    if HAS_START:
        start = tl.load(new_start_ptr + b * stride_start).to(tl.int64)
    else:
        start = tl.load(start_ptr + b)
    if HAS_END:
        end = tl.load(new_end_ptr + b * stride_end).to(tl.int64)
    else:
        end = tl.load(end_ptr + b) + num_new
    tl.debug_barrier()  # every warp has read what one of them now writes
    if tl.program_id(0) == 0:
        tl.store(start_ptr + b, start)
        tl.store(end_ptr + b, end)
    k_ptr += b * stride_kb
    _write_windows(
        k_ptr,
        compressed_ptr + b * stride_wb,
        stride_kh,
        stride_ks,
        stride_kd,
        stride_wh,
        stride_ws,
        stride_wd,
        start,
        end,
        S,
        C,
        num_new,
        Hkv,
        KERNEL_SIZE,
        KERNEL_STRIDE,
        D,
        BLOCK_D,
        WINDOWS,
    )
    if HAS_COARSE:
        _write_windows(
            k_ptr,
            coarse_ptr + b * stride_cb,
            stride_kh,
            stride_ks,
            stride_kd,
            stride_ch,
            stride_cs,
            stride_cd,
            start,
            end,
            S,
            C2,
            num_new,
            Hkv,
            COARSE_SIZE,
            COARSE_STRIDE,
            D,
            BLOCK_D,
            WINDOWS,
        )


def launch(
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
    """Move the counters on, and write the windows of both levels that became whole: one launch."""
    B, Hkv, S, D = k.shape
    if not B:
        return
    programs = 1
    if num_new > kernel_stride:  # more than a step
        programs = triton.cdiv((num_new // kernel_stride + 1) * Hkv, _WINDOWS)
        new_end = end + num_new if new_end is None else new_end
    new_start = start if new_start is None else new_start.expand(B)
    has_end = new_end is not None
    new_end = end if new_end is None else new_end.expand(B)
    levels = compressed, compressed if coarse is None else coarse
    _append_kernel[(programs, B)](
        k,
        *levels,
        start,
        end,
        new_start,
        new_end,
        *k.stride(),
        *levels[0].stride(),
        *levels[1].stride(),
        new_start.stride(0),
        new_end.stride(0),
        S,
        levels[0].shape[2],
        levels[1].shape[2],
        num_new,
        Hkv,
        KERNEL_SIZE=kernel_size,
        KERNEL_STRIDE=kernel_stride,
        COARSE_SIZE=coarse_size,
        COARSE_STRIDE=coarse_stride,
        HAS_COARSE=coarse is not None,
        HAS_START=new_start is not start,
        HAS_END=has_end,
        D=D,
        BLOCK_D=triton.next_power_of_2(D),
        WINDOWS=_WINDOWS,
        num_warps=8,
    )
