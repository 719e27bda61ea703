"""Normalise the scores: each row's log-sum-exp over the coarse keys it sees."""

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.kernel_args import HeadKeys, view_head
from infllm_flex_ops.selection.kernels.online_softmax import (
    count_windows,
    logit_of_sum,
    softmax_over_keys,
)
from infllm_flex_ops.selection.kernels.prefill.documents import locate_rows
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
    RULE: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Fill ``lse [num_heads, tiles, HEADS * TOKENS]`` for the rows of some heads, a tile each."""
    tiles = tl.cdiv(row_end - row_start, TILE.TOKENS)
    tile = tiles - 1 - tl.program_id(0) // num_heads  # the longest first
    head = tl.program_id(0) % num_heads
    b = ((head_start + head) // Hkv).to(tl.int64)
    h = ((head_start + head) % Hkv).to(tl.int64)
    rows = locate_rows(
        documents_ptr + b * num_parts * 3,
        row_start + tile * TILE.TOKENS,
        row_end,
        q_offset,
        part_start,
        RULE.num_selected,
        PART,
    )
    last_position = rows.q_offset + tl.minimum(rows.start + TILE.TOKENS, rows.end) - 1
    if (last_position < rows.budget * RULE.block_size) | (rows.start >= rows.end):
        return
    column = tl.arange(0, TILE.HEADS * TILE.TOKENS)
    token = rows.start + column % TILE.TOKENS
    queries = load_queries(q, b, h, token, token < rows.end, TILE)
    position = rows.q_offset + token

    SIZE: tl.constexpr = RULE.coarse_size
    STRIDE: tl.constexpr = RULE.coarse_stride
    num_seen = count_windows(position, SIZE, STRIDE, C2)
    end = count_windows(last_position, SIZE, STRIDE, C2)
    coarse_start = rows.seq_start // STRIDE
    coarse_view = view_head(coarse, b, h, coarse_start, PART)
    m_i, l_i = softmax_over_keys(
        queries,
        HeadKeys(coarse_view, coarse_desc, b.to(tl.int32), h.to(tl.int32), coarse_start),
        0,
        end,
        count_windows(rows.q_offset + rows.start, SIZE, STRIDE, C2),
        num_seen,
        qk_scale_log2,
        TILE,
        USE_TMA,
    )
    lse = logit_of_sum(m_i, l_i, qk_scale_log2)
    # Rows that see no coarse key are normalised by the compressed keys.
    if rows.q_offset + rows.start < SIZE - 1:
        last = tl.minimum(last_position, SIZE - 2)
        end = count_windows(last, RULE.kernel_size, RULE.kernel_stride, C)
        num_seen = count_windows(position, RULE.kernel_size, RULE.kernel_stride, C)
        keys_view = view_head(keys, b, h, rows.seq_start // RULE.kernel_stride, PART)
        m_i, l_i = softmax_over_keys(
            queries,
            HeadKeys(keys_view, None, 0, 0, 0),
            0,
            end,
            0,
            num_seen,
            qk_scale_log2,
            TILE,
            False,
        )
        own_lse = logit_of_sum(m_i, l_i, qk_scale_log2)
        lse = tl.where(position < SIZE - 1, own_lse, lse)
    at = (head.to(tl.int64) * tiles + tile) * (TILE.HEADS * TILE.TOKENS)
    tl.store(lse_ptr + at + column, lse)
