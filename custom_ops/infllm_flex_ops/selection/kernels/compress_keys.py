"""Triton kernel of ``compress_keys``: one program averages a few windows of one KV head."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.triton_common.pages import Paging, token_offset
from infllm_flex_ops.triton_common.tensor_args import View, view

_WINDOWS = 8  # per program: a warp reads whole key rows, and a short prompt still fills the device


class Level(NamedTuple):
    """Windows of one size, at compile time.

    Attributes:
        SIZE: Tokens of a window.
        STRIDE: Tokens between the first tokens of two windows.
        PAGE: Keys of a page; 0 for keys in one piece.
        PAGING: How windows lie in pages; None for windows in one piece.
    """

    SIZE: int
    STRIDE: int
    PAGE: int
    PAGING: Paging | None


@triton.jit
def average_windows(
    keys,
    token_start,
    mask,
    row,
    DTYPE: tl.constexpr,
    LEVEL: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Average windows of keys cast to ``DTYPE`` in float32: ``[WINDOWS, BLOCK_D]``.

    Sums run over the tokens of a stride and then over the strides of a window: the order of the
    definition.

    Args:
        keys: View of one KV head, with pointers to the elements of D, ``[1, BLOCK_D]``.
        token_start: First token of each window, int64 ``[WINDOWS]``.
        mask: Which elements are read, ``[WINDOWS, BLOCK_D]``.
        row: The ``RowPages``; None for keys in one piece.
        DTYPE: The dtype of the result.
        LEVEL: The windows.
        WINDOWS: Windows at a time.
        BLOCK_D: The head dim, padded to a power of two.
    """
    STRIDE: tl.constexpr = LEVEL.STRIDE
    total = tl.zeros([WINDOWS, BLOCK_D], tl.float32)
    for begin in range(0, LEVEL.SIZE, STRIDE):
        stride_sum = tl.zeros([WINDOWS, BLOCK_D], tl.float32)
        for offset in tl.range(0, STRIDE, loop_unroll_factor=8):
            token = token_start + (begin + offset)
            row_ptr = keys.ptr + token_offset(keys, token[:, None], row, LEVEL.PAGE)
            k = tl.load(row_ptr, mask=mask, other=0.0)
            stride_sum += k.to(DTYPE).to(tl.float32)
        total += stride_sum
    size = tl.full([WINDOWS, BLOCK_D], LEVEL.SIZE, tl.float32)
    return tl.div_rn(total, size)


@triton.jit(do_not_specialize=["C"])
def _compress_keys_kernel(
    k,
    out_ptr,
    C,
    Hkv,
    LEVEL: tl.constexpr,
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
        View(k_ptr + d[None, :].to(tl.int64) * k.d, k.b, k.h, k.s, k.d),
        window.to(tl.int64) * LEVEL.STRIDE,
        mask,
        None,
        k.ptr.dtype.element_ty,
        LEVEL,
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
            LEVEL=Level(kernel_size, kernel_stride, 0, None),
            D=D,
            BLOCK_D=triton.next_power_of_2(D),
            WINDOWS=_WINDOWS,
        )
    return out
