"""Normalise the scores: each row's log-sum-exp over the coarse keys it sees."""

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.select_blocks.documents import locate_tile
from infllm_flex_ops.selection.kernels.window_sums import count_windows, sum_run


@triton.jit
def _row_lse(
    q,
    q_ptr,
    q_mask,
    stride_qd,
    keys_ptr,
    stride_s,
    stride_d,
    boxes,
    b,
    h,
    first_key,
    count,
    whole,
    seen,
    factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP32: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Take the log-sum-exp of each query row over its first ``seen`` keys, before scaling.

    It is a dot product ``x`` for which ``2 ** (x * factor)`` is the sum.
    """
    top, total = sum_run(
        q,
        q_ptr,
        q_mask,
        stride_qd,
        keys_ptr,
        stride_s,
        stride_d,
        boxes,
        b,
        h,
        first_key,
        0,
        count,
        whole,
        seen,
        factor,
        D,
        BLOCK_D,
        BLOCK_N,
        FP32,
        USE_TMA,
    )
    return top + tl.log2(tl.where(total == 0.0, 1.0, total)) / factor  # none seen: -inf


_VARYING = ["first_head", "num_heads", "first_row", "end_row", "offset", "C", "C2"]
_VARYING += ["num_parts", "first_part"]


@triton.jit(do_not_specialize=_VARYING)
def lse_kernel(
    q_ptr,
    keys_ptr,
    coarse_ptr,
    boxes,
    lse_ptr,
    documents_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_cb,
    stride_ch,
    stride_cs,
    stride_cd,
    first_head,
    num_heads,
    first_row,
    end_row,
    offset,
    C,
    C2,
    factor,
    Hkv,
    num_parts,
    first_part,
    G: tl.constexpr,
    D: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    COARSE_SIZE: tl.constexpr,
    COARSE_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DENSE: tl.constexpr,
    PART: tl.constexpr,
    PART_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP32: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Fill ``lse [num_heads, tiles, HEADS * TOKENS]`` for the rows of some heads, a tile each."""
    tiles = tl.cdiv(end_row - first_row, TOKENS)
    tile = tiles - 1 - tl.program_id(0) // num_heads  # the longest first
    head = tl.program_id(0) % num_heads
    first = first_row + tile * TOKENS
    b = ((first_head + head) // Hkv).to(tl.int64)
    h = ((first_head + head) % Hkv).to(tl.int64)
    dense = DENSE
    first_coarse = 0
    if PART > 0:
        first, begin, end_row, budget = locate_tile(
            documents_ptr + b * num_parts * 3, first, first_part, offset, PART, PART_ROWS
        )
        offset -= begin
        dense = budget * BLOCK_SIZE
        keys_ptr += (begin // KERNEL_STRIDE).to(tl.int64) * stride_ks
        first_coarse = begin // COARSE_STRIDE
        coarse_ptr += first_coarse.to(tl.int64) * stride_cs
    last_position = offset + tl.minimum(first + TOKENS, end_row) - 1
    if (last_position < dense) | (first >= end_row):
        return
    column = tl.arange(0, HEADS * TOKENS)
    group = column // TOKENS
    row = first + column % TOKENS
    q_row = b * stride_qb + (h * G + group) * stride_qh + row.to(tl.int64) * stride_qs
    q_ptr += q_row[:, None]
    q_mask = ((group < G) & (row < end_row))[:, None]
    q = q_mask  # unused in parts
    if not FP32:
        d = tl.arange(0, BLOCK_D)
        q = tl.load(q_ptr + d[None, :] * stride_qd, mask=q_mask & (d < D)[None, :], other=0.0)

    position = offset + row
    seen = count_windows(position, COARSE_SIZE, COARSE_STRIDE, C2)
    count = count_windows(last_position, COARSE_SIZE, COARSE_STRIDE, C2)
    coarse_ptr += b * stride_cb + h * stride_ch
    lse = _row_lse(
        q,
        q_ptr,
        q_mask,
        stride_qd,
        coarse_ptr,
        stride_cs,
        stride_cd,
        boxes,
        b.to(tl.int32),
        h.to(tl.int32),
        first_coarse,
        count,
        count_windows(offset + first, COARSE_SIZE, COARSE_STRIDE, C2),
        seen,
        factor,
        D,
        BLOCK_D,
        BLOCK_N,
        FP32,
        USE_TMA,
    )
    if offset + first < COARSE_SIZE - 1:  # some row sees no coarse key: the compressed ones serve
        blind = tl.minimum(last_position, COARSE_SIZE - 2)
        few = count_windows(blind, KERNEL_SIZE, KERNEL_STRIDE, C)
        seen_keys = count_windows(position, KERNEL_SIZE, KERNEL_STRIDE, C)
        keys_ptr += b * stride_kb + h * stride_kh
        own_lse = _row_lse(
            q,
            q_ptr,
            q_mask,
            stride_qd,
            keys_ptr,
            stride_ks,
            stride_kd,
            boxes,
            0,
            0,
            0,
            few,
            0,
            seen_keys,
            factor,
            D,
            BLOCK_D,
            BLOCK_N,
            FP32,
            False,
        )
        lse = tl.where(position < COARSE_SIZE - 1, own_lse, lse)
    tl.store(lse_ptr + (head.to(tl.int64) * tiles + tile) * (HEADS * TOKENS) + column, lse)
