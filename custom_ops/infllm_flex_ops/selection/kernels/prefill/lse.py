"""Normalise the scores: each row's log-sum-exp over the coarse keys it sees."""

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.kernel_args import HeadKeys, view_head
from infllm_flex_ops.selection.kernels.online_softmax import (
    KeySpan,
    count_windows,
    logit_of_sum,
    softmax_over_keys,
)
from infllm_flex_ops.selection.kernels.prefill.documents import ChunkRows, Documents, locate_tile
from infllm_flex_ops.selection.kernels.prefill.queries import load_queries

_VARYING = ["head_start", "num_heads", "row_start", "row_end", "q_offset", "C", "C2"]
_VARYING += ["num_parts", "part_start"]


@triton.jit(do_not_specialize=_VARYING)
def lse_kernel(
    q,
    keys,
    coarse,
    coarse_desc,
    lse_ptr,
    documents_ptr,
    head_start,
    num_heads,
    row_start,
    row_end,
    q_offset,
    C,
    C2,
    qk_scale_log2,
    Hkv,
    num_parts,
    part_start,
    SIZES: tl.constexpr,
):
    """Fill ``lse [num_heads, tiles, HEADS * TOKENS]`` for the rows of some heads, a tile each."""
    RULE: tl.constexpr = SIZES.RULE
    PART: tl.constexpr = SIZES.PART
    TILE: tl.constexpr = SIZES.TILE
    chunk = ChunkRows(head_start, num_heads, row_start, row_end, q_offset)
    place = locate_tile(chunk, Documents(documents_ptr, num_parts, part_start), Hkv, 1, SIZES)
    rows, b, h = place.rows, place.b.to(tl.int64), place.h.to(tl.int64)
    if place.needs_no_scores:
        return
    column = tl.arange(0, TILE.HEADS * TILE.TOKENS)
    token = rows.start + column % TILE.TOKENS
    queries = load_queries(q, b, h, token, token < rows.end, TILE)
    position = rows.q_offset + token

    SIZE: tl.constexpr = RULE.coarse_size
    STRIDE: tl.constexpr = RULE.coarse_stride
    num_seen = count_windows(position, SIZE, STRIDE, C2)
    end = count_windows(place.last_position, SIZE, STRIDE, C2)
    coarse_start = rows.seq_start // STRIDE
    coarse_view = view_head(coarse, b, h, coarse_start, PART)
    coarse_keys = HeadKeys(coarse_view, coarse_desc, b.to(tl.int32), h.to(tl.int32), coarse_start)
    first_position = rows.q_offset + rows.start
    span = KeySpan(0, end, count_windows(first_position, SIZE, STRIDE, C2))
    m_i, l_i = softmax_over_keys(queries, coarse_keys, span, num_seen, qk_scale_log2, TILE)
    lse = logit_of_sum(m_i, l_i, qk_scale_log2)
    # Rows that see no coarse key are normalised by the compressed keys.
    if first_position < SIZE - 1:
        last = tl.minimum(place.last_position, SIZE - 2)
        end = count_windows(last, RULE.kernel_size, RULE.kernel_stride, C)
        num_seen = count_windows(position, RULE.kernel_size, RULE.kernel_stride, C)
        keys_view = view_head(keys, b, h, rows.seq_start // RULE.kernel_stride, PART)
        head_keys = HeadKeys(keys_view, None, 0, 0, 0)
        span = KeySpan(0, end, 0)
        m_i, l_i = softmax_over_keys(queries, head_keys, span, num_seen, qk_scale_log2, TILE)
        own_lse = logit_of_sum(m_i, l_i, qk_scale_log2)
        lse = tl.where(position < SIZE - 1, own_lse, lse)
    tiles = tl.cdiv(row_end - row_start, TILE.TOKENS)
    at = (place.head.to(tl.int64) * tiles + place.tile) * (TILE.HEADS * TILE.TOKENS)
    tl.store(lse_ptr + at + column, lse)
