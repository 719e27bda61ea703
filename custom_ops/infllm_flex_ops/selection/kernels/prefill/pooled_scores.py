"""Score blocks by pooled queries: a tile of queries against runs of blocks."""

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.pool_queries import round_like_float8
from infllm_flex_ops.selection.kernels.prefill.documents import (
    ChunkRows,
    Documents,
    cut_run,
    locate_tile,
)
from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32
from infllm_flex_ops.triton_common.pages import step_offset
from infllm_flex_ops.triton_common.tensor_args import RowTensor

_VARYING = ["head_start", "num_heads", "row_start", "row_end", "q_offset", "C"]
_VARYING += ["split_blocks", "splits", "num_parts", "part_start"]


@triton.jit
def rank(logit):
    """Turn dot products into non-negative floats of the same order, as the definition does."""
    logit = tl.where(logit == logit, logit, -1e38)
    bits = tl.minimum(tl.maximum(logit, -1e38), 1e38).to(tl.int32, bitcast=True)
    bits = ((bits ^ (bits >> 31 & 0x7FFFFFFF)) >> 1) + (1 << 30)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=_VARYING)
def pooled_score_kernel(
    q,
    keys,
    table,
    out,
    documents_ptr,
    head_start,
    num_heads,
    row_start,
    row_end,
    q_offset,
    C,
    split_blocks,
    splits,
    Hkv,
    num_parts,
    part_start,
    SIZES: tl.constexpr,
    PAGING: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """Fill the scores of a tile for a run of blocks, and the best of every segment.

    Only blocks before each token's local blocks are used later, and each token sees those whole:
    nothing is masked here. Keys in pages, whose row has the pages ``table``, are rounded to e4m3
    here where ``FLOAT8`` is set; other keys have the dtype of the queries.
    """
    RULE: tl.constexpr = SIZES.RULE
    WINDOWS: tl.constexpr = SIZES.WINDOWS
    TILE: tl.constexpr = SIZES.TILE
    SEGMENT: tl.constexpr = SIZES.SEGMENT
    STEP: tl.constexpr = TILE.BLOCK_N // WINDOWS.SLOTS
    STEP_WINDOWS: tl.constexpr = STEP * WINDOWS.PER_BLOCK
    chunk = ChunkRows(head_start, num_heads, row_start, row_end, q_offset)
    documents = Documents(documents_ptr, num_parts, part_start)
    place = locate_tile(chunk, documents, Hkv, splits, SIZES)
    rows, b, h = place.rows, place.b.to(tl.int64), place.h.to(tl.int64)
    out_row = place.out_row + tl.arange(0, TILE.TOKENS)
    run = cut_run(place, split_blocks, RULE)
    if place.needs_no_scores | (run.first_block >= run.num_scored):
        return
    keys_ptr = keys.ptr
    if SIZES.PART.SIZE > 0:
        window_start = rows.seq_start // RULE.kernel_size
        keys_ptr += window_start.to(tl.int64) * keys.s
        C -= window_start
    token = rows.start + tl.arange(0, TILE.TOKENS)
    exists = token < rows.end
    d = tl.arange(0, TILE.BLOCK_D)
    q_ptr = q.ptr + (b * q.b + h * q.h)
    q_ptr += token.to(tl.int64)[:, None] * q.s
    if not TILE.FP32:
        q_mask = exists[:, None] & (d < TILE.D)[None, :]
        x = tl.load(q_ptr + d[None, :] * q.d, mask=q_mask, other=0.0)

    keys_ptr += b * keys.b + h * keys.h
    n = tl.arange(0, TILE.BLOCK_N)
    slot = n % WINDOWS.SLOTS
    block_slot = tl.arange(0, STEP)
    at = out_row[:, None] * out.columns + block_slot[None, :]
    best = tl.full([TILE.TOKENS], 0.0, tl.float32)
    for block in tl.range(run.first_block, run.end_block, STEP):
        first = block * WINDOWS.PER_BLOCK
        window = (block + n // WINDOWS.SLOTS) * WINDOWS.PER_BLOCK + slot
        valid = (window < C) & (slot < WINDOWS.PER_BLOCK)
        offset = step_offset(keys, first, window, C, table, PAGING, STEP_WINDOWS)
        key_ptr = keys_ptr + offset[None, :]
        if TILE.FP32:
            queries = RowTensor(None, q_ptr, exists[:, None], q.d)
            columns = RowTensor(None, key_ptr, valid[None, :], keys.d)
            logits = dot_fp32(queries, columns, TILE.D, TILE.BLOCK_D)
        else:
            mask = valid[None, :] & (d < TILE.D)[:, None]
            k = tl.load(key_ptr + d[:, None] * keys.d, mask=mask, other=0.0)
            if FLOAT8:
                if x.dtype == tl.float8e4nv:  # the device rounds in the same way
                    k = k.to(tl.float8e4nv)
                else:  # half precision holds e4m3 exactly
                    k = round_like_float8(k.to(tl.float32)).to(tl.float16)
            logits = tl.dot(x, k)
        if WINDOWS.SLOTS != WINDOWS.PER_BLOCK:
            logits = tl.where((slot < WINDOWS.PER_BLOCK)[None, :], logits, float("-inf"))
        score = rank(tl.max(tl.reshape(logits, [TILE.TOKENS, STEP, WINDOWS.SLOTS]), 2))
        listed = exists[:, None] & (block + block_slot < run.end_block)[None, :]
        tl.store(out.ptr + at + block, score, mask=listed)
        best = tl.where(block % SEGMENT == 0, 0.0, best)
        best = tl.maximum(best, tl.max(score, 1))
        ends = ((block + STEP) % SEGMENT == 0) | (block + STEP >= run.end_block)
        segment_at = (out_row * out.columns + block) // SEGMENT
        tl.store(out.segment_ptr + segment_at, best, mask=exists & ends)
