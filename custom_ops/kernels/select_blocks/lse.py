"""Normalise the scores: each row's log-sum-exp over the coarse keys it sees."""

import triton
import triton.language as tl

from custom_ops.kernels.dot_in_parts import dot_in_parts
from custom_ops.kernels.select_blocks.documents import locate_tile


@triton.jit
def _count_seen(position, SIZE: tl.constexpr, STRIDE: tl.constexpr, count):
    """Count the windows that lie wholly at or before each position."""
    return tl.minimum(tl.maximum(position + 1 - SIZE + STRIDE, 0) // STRIDE, count)


@triton.jit
def _row_lse(
    q,
    q_ptr,
    q_mask,
    stride_qd,
    keys_ptr,
    stride_s,
    stride_d,
    count,
    seen,
    factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """Take the log-sum-exp of each query row over its first ``seen`` keys, before scaling.

    It is a dot product ``x`` for which ``2 ** (x * factor)`` is the sum: subtracted from another
    before both are scaled, it leaves equal products equal and small differences exact.
    """
    top = tl.full([q_ptr.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q_ptr.shape[0]], tl.float32)
    d = tl.arange(0, BLOCK_D)
    for start in range(0, count, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key_ptr = keys_ptr + n[None, :].to(tl.int64) * stride_s
        valid = (n < count)[None, :]
        if IN_PARTS:
            logits = dot_in_parts(q_ptr, q_mask, stride_qd, key_ptr, valid, stride_d, D, BLOCK_D)
        else:
            mask = valid & (d < D)[:, None]
            logits = tl.dot(q, tl.load(key_ptr + d[:, None] * stride_d, mask=mask, other=0.0))
        logits = tl.where(n[None, :] < seen[:, None], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2((logits - base[:, None]) * factor)
        total = total * tl.exp2((top - base) * factor) + tl.sum(weights, 1)
        top = new_top
    return top + tl.log2(tl.where(total == 0.0, 1.0, total)) / factor  # none seen: -inf


_VARYING = ["first_head", "num_heads", "first_row", "end_row", "offset", "C", "C2"]
_VARYING += ["num_parts", "first_part"]


@triton.jit(do_not_specialize=_VARYING)
def lse_kernel(
    q_ptr,
    keys_ptr,
    coarse_ptr,
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
    IN_PARTS: tl.constexpr,
):
    """Fill ``lse [num_heads, tiles, HEADS * TOKENS]`` for the rows of some heads, a tile each."""
    tiles = tl.cdiv(end_row - first_row, TOKENS)
    tile = tiles - 1 - tl.program_id(0) // num_heads  # the longest first
    head = tl.program_id(0) % num_heads
    first = first_row + tile * TOKENS
    b = ((first_head + head) // Hkv).to(tl.int64)
    h = ((first_head + head) % Hkv).to(tl.int64)
    dense = DENSE
    if PART > 0:
        first, begin, end_row, budget = locate_tile(
            documents_ptr + b * num_parts * 3, first, first_part, offset, PART, PART_ROWS
        )
        offset -= begin
        dense = budget * BLOCK_SIZE
        keys_ptr += (begin // KERNEL_STRIDE).to(tl.int64) * stride_ks
        coarse_ptr += (begin // COARSE_STRIDE).to(tl.int64) * stride_cs
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
    if not IN_PARTS:
        d = tl.arange(0, BLOCK_D)
        q = tl.load(q_ptr + d[None, :] * stride_qd, mask=q_mask & (d < D)[None, :], other=0.0)

    position = offset + row
    seen = _count_seen(position, COARSE_SIZE, COARSE_STRIDE, C2)
    count = _count_seen(last_position, COARSE_SIZE, COARSE_STRIDE, C2)
    coarse_ptr += b * stride_cb + h * stride_ch
    lse = _row_lse(
        q,
        q_ptr,
        q_mask,
        stride_qd,
        coarse_ptr,
        stride_cs,
        stride_cd,
        count,
        seen,
        factor,
        D,
        BLOCK_D,
        BLOCK_N,
        IN_PARTS,
    )
    if offset + first < COARSE_SIZE - 1:  # some row sees no coarse key: the compressed ones serve
        blind = tl.minimum(last_position, COARSE_SIZE - 2)
        few = _count_seen(blind, KERNEL_SIZE, KERNEL_STRIDE, C)
        seen_keys = _count_seen(position, KERNEL_SIZE, KERNEL_STRIDE, C)
        keys_ptr += b * stride_kb + h * stride_kh
        own_lse = _row_lse(
            q,
            q_ptr,
            q_mask,
            stride_qd,
            keys_ptr,
            stride_ks,
            stride_kd,
            few,
            seen_keys,
            factor,
            D,
            BLOCK_D,
            BLOCK_N,
            IN_PARTS,
        )
        lse = tl.where(position < COARSE_SIZE - 1, own_lse, lse)
    tl.store(lse_ptr + (head.to(tl.int64) * tiles + tile) * (HEADS * TOKENS) + column, lse)
