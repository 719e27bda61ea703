"""Score blocks for tiles of queries: weights of windows, summed over the group, pooled on chip.

A row's bits depend only on its position and on the keys it sees: the tile's shape is fixed by
dtype, head dim and group, and every reduction runs over fixed groups of keys in a fixed order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.kernel_args import HeadKeys, view_head
from infllm_flex_ops.selection.kernels.online_softmax import count_windows
from infllm_flex_ops.selection.kernels.prefill.documents import (
    ChunkRows,
    Documents,
    cut_run,
    locate_tile,
)
from infllm_flex_ops.selection.kernels.prefill.queries import load_query_columns
from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32
from infllm_flex_ops.triton_common.tensor_args import RowTensor

VARYING = ["head_start", "num_heads", "row_start", "row_end", "q_offset", "C"]
VARYING += ["split_blocks", "splits", "lse_tile", "lse_tiles", "num_parts", "part_start"]


class _Scored(NamedTuple):
    """Queries and keys of a tile, as they are scored, in a kernel.

    Attributes:
        queries: Columns of the tile.
        keys: Compressed keys of one KV head.
        rows: Rows of the tile.
        C: Windows of the sequence.
        shift: Minus the normaliser of each column.
        qk_scale_log2: Factor on the logits.
    """

    queries: Any
    keys: Any
    rows: Any
    C: Any
    shift: Any
    qk_scale_log2: Any


@triton.jit
def _weigh_windows(scored, block, position, SIZES: tl.constexpr, EDGE: tl.constexpr):
    """Weigh the windows of some blocks, summed over the group: ``[BLOCK_N, TOKENS]``.

    Args:
        scored: Queries and keys.
        block: The first block.
        position: Position of each token.
        SIZES: Compile-time sizes.
        EDGE: Some windows may be invisible: they weigh -1.
    """
    RULE: tl.constexpr = SIZES.RULE
    WINDOWS: tl.constexpr = SIZES.WINDOWS
    TILE: tl.constexpr = SIZES.TILE
    queries, keys = scored.queries, scored.keys
    n = tl.arange(0, TILE.BLOCK_N)
    slot = n % WINDOWS.SLOTS
    window = (block + n // WINDOWS.SLOTS) * WINDOWS.PER_BLOCK + slot - WINDOWS.BEFORE
    in_block = slot < WINDOWS.PER_BLOCK + WINDOWS.BEFORE
    valid = (window >= 0) & (window < scored.C) & in_block
    key_ptr = keys.view.ptr + window.to(tl.int64)[:, None] * keys.view.s
    if TILE.FP32:
        key_rows = RowTensor(None, key_ptr, valid[:, None], keys.view.d)
        logits = dot_fp32(key_rows, queries, TILE.D, TILE.BLOCK_D)
    elif keys.desc is not None:
        box = keys.desc.load([keys.b, keys.h, keys.start + block * WINDOWS.PER_BLOCK, 0])
        logits = tl.dot(box.reshape(TILE.BLOCK_N, TILE.BLOCK_D), queries.loaded)
    else:
        d = tl.arange(0, TILE.BLOCK_D)
        mask = valid[:, None] & (d < TILE.D)[None, :]
        x = tl.load(key_ptr + d[None, :] * keys.view.d, mask=mask, other=0.0)
        logits = tl.dot(x, queries.loaded)
    # One rounding, in every kernel with the same scores: equal products stay equal.
    weights = tl.exp2(tl.fma(logits, scored.qk_scale_log2, scored.shift))
    if TILE.HEADS > TILE.G:
        group = tl.arange(0, TILE.HEADS * TILE.TOKENS) // TILE.TOKENS
        weights = tl.where((group < TILE.G)[None, :], weights, 0.0)
    weight = tl.sum(tl.reshape(weights, [TILE.BLOCK_N, TILE.HEADS, TILE.TOKENS]), 1)
    weight = tl.minimum(tl.maximum(weight, 0.0), 3.4028234663852886e38)  # NaN becomes 0
    if EDGE:
        window_end = window * RULE.kernel_stride + RULE.kernel_size - 1
        seen = valid[:, None] & (window_end[:, None] <= position[None, :])
        weight = tl.where(seen, weight, -1.0)
    return weight


@triton.jit
def _store_scores(out, out_row, exists, score, block, run, SEGMENT: tl.constexpr):
    """Store ``score [STEP, TOKENS]`` of the blocks from ``block`` on, and the best of segments.

    Only blocks of the run that are scored are stored. ``out_row`` is where each token's row begins.
    """
    STEP: tl.constexpr = score.shape[0]
    TOKENS: tl.constexpr = score.shape[1]
    blocks = block + tl.arange(0, STEP)
    listed = (blocks >= run.first_block) & (blocks < run.num_scored)
    at = out_row[None, :] + blocks[:, None]
    tl.store(out.ptr + at, score, mask=listed[:, None] & exists[None, :])
    if SEGMENT > 0:
        SEGMENTS: tl.constexpr = STEP // SEGMENT
        best = tl.max(tl.reshape(score, [SEGMENTS, SEGMENT, TOKENS]), 1)
        blocks = block + tl.arange(0, SEGMENTS) * SEGMENT
        listed = (blocks >= run.first_block) & (blocks < run.num_scored)
        at = (out_row[None, :] + blocks[:, None]) // SEGMENT
        tl.store(out.segment_ptr + at, best, mask=listed[:, None] & exists[None, :])


@triton.jit
def _score_run(scored, run, out, out_row, SIZES: tl.constexpr):
    """Score a run of blocks for a tile and store the scores.

    Args:
        scored: Queries and keys.
        run: The blocks.
        out: Where scores go.
        out_row: Where each token's row begins there.
        SIZES: Compile-time sizes.
    """
    RULE: tl.constexpr = SIZES.RULE
    WINDOWS: tl.constexpr = SIZES.WINDOWS
    TILE: tl.constexpr = SIZES.TILE
    rows = scored.rows
    STEP: tl.constexpr = TILE.BLOCK_N // WINDOWS.SLOTS
    begin = run.first_block
    if WINDOWS.TAIL > 0:  # the first block needs the tail of the one before the run
        begin = tl.maximum(run.first_block - STEP, 0)
    inner_end = begin
    # Float32 leaves no registers for a second loop, and windows of other blocks need the tests.
    ALL_EDGE: tl.constexpr = TILE.FP32 or WINDOWS.SLOTS != WINDOWS.PER_BLOCK
    if not ALL_EDGE:  # every row sees all windows of these blocks
        whole = count_windows(
            rows.q_offset + rows.start, RULE.kernel_size, RULE.kernel_stride, scored.C
        )
        num_whole = tl.minimum(run.end_block, whole // WINDOWS.PER_BLOCK) - begin
        inner_end += tl.maximum(num_whole, 0) // STEP * STEP
    token = rows.start + tl.arange(0, TILE.TOKENS)
    slot = tl.arange(0, TILE.BLOCK_N) % WINDOWS.SLOTS
    block_slot = tl.arange(0, STEP)
    previous = tl.full([STEP, TILE.TOKENS], -1.0, tl.float32)  # row 0: of the block before the step
    zeros = tl.full([STEP, TILE.TOKENS], 0, tl.int32)
    row_before = ((block_slot + STEP - 1) % STEP)[:, None] + zeros
    for EDGE in tl.static_range(1 if ALL_EDGE else 0, 2):
        for block in tl.range(
            inner_end if EDGE else begin, run.end_block if EDGE else inner_end, STEP
        ):
            weight = _weigh_windows(scored, block, rows.q_offset + token, SIZES, EDGE)
            score = tl.max(tl.reshape(weight, [STEP, WINDOWS.SLOTS, TILE.TOKENS]), 1)
            if WINDOWS.TAIL > 0:  # move the windows that reach into the next block there
                in_tail = (slot >= WINDOWS.PER_BLOCK - WINDOWS.TAIL)[:, None]
                tail = tl.where(in_tail, weight, -1.0)
                tail = tl.max(tl.reshape(tail, [STEP, WINDOWS.SLOTS, TILE.TOKENS]), 1)
                moved = tl.gather(tail, row_before, 0)
                score = tl.maximum(score, tl.where(block_slot[:, None] == 0, previous, moved))
                previous = moved
            _store_scores(out, out_row, token < rows.end, score, block, run, SIZES.SEGMENT)


@triton.jit(do_not_specialize=VARYING)
def score_kernel(
    q,
    keys,
    desc,
    lse_ptr,
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
    lse_tile,
    lse_tiles,
    qk_scale_log2,
    Hkv,
    num_parts,
    part_start,
    SIZES: tl.constexpr,
):
    """Fill the scores of a tile for a run of blocks.

    A score is the best of the windows that begin in the block and of the last ``WINDOWS.TAIL`` of
    those that begin in the block before.
    """
    RULE: tl.constexpr = SIZES.RULE
    PART: tl.constexpr = SIZES.PART
    TILE: tl.constexpr = SIZES.TILE
    chunk = ChunkRows(head_start, num_heads, row_start, row_end, q_offset)
    documents = Documents(documents_ptr, num_parts, part_start)
    place = locate_tile(chunk, documents, Hkv, splits, SIZES)
    rows, head, b, h = place.rows, place.head, place.b.to(tl.int64), place.h.to(tl.int64)
    out_row = place.out_row + tl.arange(0, TILE.TOKENS)
    window_start = rows.seq_start // RULE.kernel_stride
    if PART.SIZE > 0:
        C -= window_start
    run = cut_run(place, split_blocks, RULE)
    if place.needs_no_scores | (run.first_block >= run.num_scored):
        return
    column = tl.arange(0, TILE.HEADS * TILE.TOKENS)
    column_token = rows.start + column % TILE.TOKENS
    queries = load_query_columns(q, b, h, column_token, column_token < rows.end, TILE)
    lse_ptr += (head.to(tl.int64) * lse_tiles + lse_tile + place.tile) * (TILE.HEADS * TILE.TOKENS)
    shift = -qk_scale_log2 * tl.load(lse_ptr + column)[None, :]
    keys_view = view_head(keys, b, h, window_start, PART)
    head_keys = HeadKeys(keys_view, desc, place.b, place.h, window_start)
    scored = _Scored(queries, head_keys, rows, C, shift, qk_scale_log2)
    _score_run(scored, run, out, out_row * out.columns, SIZES)
