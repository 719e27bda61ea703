"""Triton kernel of ``compress_keys``: one program averages a few windows of one KV head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.triton_common.tensor_args import view

_WINDOWS = 8  # per program: a warp reads whole key rows, and a short prompt still fills the device


@triton.jit
def average_windows(
    column_ptr,
    token_start,
    stride_s,
    mask,
    DTYPE: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Average windows that start at ``token_start``, of keys cast to ``DTYPE``, in float32.

    Sums run over the tokens of a stride and then over the strides of a window: the order of the
    definition.
    """
    total = tl.zeros([WINDOWS, BLOCK_D], tl.float32)
    for begin in range(0, KERNEL_SIZE, KERNEL_STRIDE):
        stride_sum = tl.zeros([WINDOWS, BLOCK_D], tl.float32)
        for offset in tl.range(0, KERNEL_STRIDE, loop_unroll_factor=8):
            token = token_start + (begin + offset)
            k = tl.load(column_ptr + token[:, None] * stride_s, mask=mask, other=0.0)
            stride_sum += k.to(DTYPE).to(tl.float32)
        total += stride_sum
    size = tl.full([WINDOWS, BLOCK_D], KERNEL_SIZE, tl.float32)
    return tl.div_rn(total, size)


@triton.jit(do_not_specialize=["C"])
def _compress_keys_kernel(
    k,
    out_ptr,
    C,
    Hkv,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """Average ``WINDOWS`` windows of one KV head into ``out [B * Hkv, C, D]``."""
    programs = tl.cdiv(C, WINDOWS)
    head = (tl.program_id(0) // programs).to(tl.int64)  # of all batch rows
    window = tl.program_id(0) % programs * WINDOWS + tl.arange(0, WINDOWS)
    d = tl.arange(0, BLOCK_D)
    mask = (window < C)[:, None] & (d < D)[None, :]

    k_ptr = k.ptr + (head // Hkv * k.b + head % Hkv * k.h)
    mean = average_windows(
        k_ptr + d[None, :].to(tl.int64) * k.d,
        window.to(tl.int64) * KERNEL_STRIDE,
        k.s,
        mask,
        k.ptr.dtype.element_ty,
        KERNEL_SIZE,
        KERNEL_STRIDE,
        WINDOWS,
        BLOCK_D,
    )
    out_row = head * C + window
    tl.store(out_ptr + out_row[:, None] * D + d[None, :], mean, mask=mask)


def launch(k: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    """Allocate the compressed keys and fill them; bits do not depend on place or length."""
    B, Hkv, S, D = k.shape
    C = max(0, (S - kernel_size) // kernel_stride + 1)
    out = torch.empty(B, Hkv, C, D, dtype=k.dtype, device=k.device)
    if out.numel():
        _compress_keys_kernel[(triton.cdiv(C, _WINDOWS) * B * Hkv,)](
            k=view(k),
            out_ptr=out,
            C=C,
            Hkv=Hkv,
            KERNEL_SIZE=kernel_size,
            KERNEL_STRIDE=kernel_stride,
            D=D,
            BLOCK_D=triton.next_power_of_2(D),
            WINDOWS=_WINDOWS,
        )
    return out
