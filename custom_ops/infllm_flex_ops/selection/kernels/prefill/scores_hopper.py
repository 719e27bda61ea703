"""The scores of ``scores.py`` on Hopper, with the same bits, one window of every block at a time.

A step multiplies the tile by one window of each of 64 blocks, the next step by another window of
the same blocks. The best of a block's windows is then found within a thread, whereas ``scores.py``
passes every weight from lane to lane. TMA loads such rows as one box. The kernel is written in
Gluon, the language below Triton, since Triton changes the layout of the scores in every step.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from infllm_flex_ops.selection.kernels.prefill import documents, scores
from infllm_flex_ops.selection.kernels.prefill.hopper_pipeline import (
    STEP,
    find_step,
    load_queries,
    load_step,
    locate_steps,
    start_pipeline,
)

_locate_tile = gluon.jit(documents.locate_tile.fn)
_cut_run = gluon.jit(documents.cut_run.fn)


class _Segments(NamedTuple):
    """The segments of a step, in the layout in which their best scores are stored.

    Attributes:
        segment: Segments within the step.
        exists: Whether each token is one.
        at: Place of each segment and token in the output, ``[segments, TOKENS]``.
    """

    segment: Any
    exists: Any
    at: Any


class _Scored(NamedTuple):
    """Queries of a tile, as they are scored, in a kernel.

    Attributes:
        queries: Columns of the tile, in shared memory.
        rows: Rows of the tile.
        C: Windows of the sequence.
        shift: Minus the normaliser of each column, in shared memory.
        qk_scale_log2: Factor on the logits.
    """

    queries: Any
    rows: Any
    C: Any
    shift: Any
    qk_scale_log2: Any


@gluon.jit
def _weigh_step(i, pipeline, scored, LOGITS: gl.constexpr, SIZES: gl.constexpr):
    """Weigh the windows of step ``i``, summed over the group: ``[STEP, TOKENS]``."""
    WINDOWS: gl.constexpr = SIZES.WINDOWS
    TILE: gl.constexpr = SIZES.TILE
    COLUMNS: gl.constexpr = TILE.HEADS * TILE.TOKENS
    STAGES: gl.constexpr = pipeline.smem.shape[0]
    done = i - pipeline.steps.begin
    stage = done % STAGES
    mbarrier.wait(pipeline.full.index(stage), done // STAGES & 1)
    keys = pipeline.smem.index(stage).reshape([STEP, TILE.BLOCK_D])
    no_logits = gl.full([STEP, COLUMNS], 0.0, gl.float32, LOGITS)
    logits = warpgroup_mma(keys, scored.queries, no_logits, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(0, deps=[logits])
    load_step(i + STAGES, pipeline, WINDOWS)
    shift = scored.shift.load(gl.SliceLayout(0, LOGITS))[None, :]
    weights = gl.exp2(gl.fma(logits, scored.qk_scale_log2, shift))
    if TILE.HEADS > TILE.G:
        column = gl.arange(0, COLUMNS, gl.SliceLayout(0, LOGITS))
        weights = gl.where((column // TILE.TOKENS < TILE.G)[None, :], weights, 0.0)
    weight = gl.sum(weights.reshape([STEP, TILE.HEADS, TILE.TOKENS]), 1)
    return gl.maximum(weight, 0.0)  # NaN becomes 0


@gluon.jit
def _load_shift(lse_ptr, qk_scale_log2, LOGITS: gl.constexpr, TILE: gl.constexpr):
    """Load minus the normaliser of each column.

    Shared memory keeps it from step to step without taking registers.
    """
    COLUMNS: gl.constexpr = TILE.HEADS * TILE.TOKENS
    shift = -qk_scale_log2 * gl.load(lse_ptr + gl.arange(0, COLUMNS, gl.SliceLayout(0, LOGITS)))
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.float32, [COLUMNS], SHARED, shift)


@gluon.jit
def _mask_invisible(weight, block, slot, n, position, C, SIZES: gl.constexpr):
    """Give the weight -1 to windows that end after the token's position."""
    RULE: gl.constexpr = SIZES.RULE
    WINDOWS: gl.constexpr = SIZES.WINDOWS
    window = (block + n) * WINDOWS.PER_BLOCK + slot
    window_end = window * RULE.kernel_stride + RULE.kernel_size - 1
    seen = (window < C)[:, None] & (window_end[:, None] <= position)
    return gl.where(seen, weight, -1.0)


@gluon.jit
def _locate_segments(rows, out, TILE: gl.constexpr, SEGMENT: gl.constexpr):
    """Lay out the segments of a step so that each thread collects those of its own tokens."""
    ACROSS: gl.constexpr = 32 // gl.constexpr(min(32, TILE.TOKENS))
    COLLECTED: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1], [1, ACROSS, 32 // ACROSS], [4, 1, 1], [2, 1, 0]
    )
    LAYOUT: gl.constexpr = gl.SliceLayout(1, COLLECTED)
    segment = gl.arange(0, STEP // SEGMENT, gl.SliceLayout(1, LAYOUT))
    token = gl.arange(0, TILE.TOKENS, gl.SliceLayout(0, LAYOUT))
    at = (token * (out.columns // SEGMENT))[None, :] + segment[:, None]
    return _Segments(segment, rows.start + token < rows.end, at)


@gluon.jit
def _store_segments(out, base, segments, score, block, run, SEGMENT: gl.constexpr):
    """Store the best of each segment of ``score [STEP, TOKENS]``, whose first block is ``block``.

    ``base`` is the place of the first segment in the tile's first row.
    """
    LAYOUT: gl.constexpr = segments.at.type.layout
    COLLECTED: gl.constexpr = LAYOUT.parent
    TOKENS: gl.constexpr = score.shape[1]
    best = gl.max(score.reshape([STEP // SEGMENT, 2, SEGMENT // 2, TOKENS]), 1)
    best = gl.max(gl.convert_layout(best, COLLECTED), 1)
    blocks = block + segments.segment * SEGMENT
    listed = ((blocks >= run.first_block) & (blocks < run.num_scored))[:, None]
    gl.store(out.segment_ptr + base + segments.at, best, mask=listed & segments.exists[None, :])


@gluon.jit
def _score_run(pipeline, scored, run, out, out_row, LOGITS: gl.constexpr, SIZES: gl.constexpr):
    """Score a run of blocks for a tile and store the scores.

    Args:
        pipeline: Steps of the run, the first of them already on the way.
        scored: Queries.
        run: The blocks.
        out: Where scores go.
        out_row: The tile's first row there.
        LOGITS: Layout of the logits.
        SIZES: Compile-time sizes.
    """
    WINDOWS: gl.constexpr = SIZES.WINDOWS
    TILE: gl.constexpr = SIZES.TILE
    SEGMENT: gl.constexpr = SIZES.SEGMENT
    rows, steps = scored.rows, pipeline.steps
    TOKENS: gl.constexpr = TILE.TOKENS
    no_logits = gl.full([STEP, TILE.HEADS * TOKENS], 0.0, gl.float32, LOGITS)
    summed = gl.sum(no_logits.reshape([STEP, TILE.HEADS, TOKENS]), 1)
    SCORES: gl.constexpr = summed.type.layout
    n = gl.arange(0, STEP, gl.SliceLayout(1, SCORES))
    token = rows.start + gl.arange(0, TOKENS, gl.SliceLayout(0, SCORES))
    exists = (token < rows.end)[None, :]
    at = ((token - rows.start) * out.columns)[None, :] + n[:, None]
    row_before = ((n + STEP - 1) % STEP)[:, None] + gl.full([STEP, TOKENS], 0, gl.int32, SCORES)
    unscored = gl.full([STEP, TOKENS], -1.0, gl.float32, SCORES)
    if SEGMENT > 0:
        segments = _locate_segments(rows, out, TILE, SEGMENT)
    score = unscored
    previous = unscored  # row 0: of the block before the step's
    for EDGE in gl.static_range(2):
        for i in range(steps.edge if EDGE else steps.begin, steps.end if EDGE else steps.edge):
            block, slot, place, early = find_step(i, steps.run, WINDOWS)
            weight = _weigh_step(i, pipeline, scored, LOGITS, SIZES)
            if EDGE:
                position = rows.q_offset + token[None, :]
                weight = _mask_invisible(weight, block, slot, n, position, scored.C, SIZES)
            score = gl.maximum(score, weight)
            if place == WINDOWS.TAIL - 1:  # move windows that reach into the next block there
                moved = gl.gather(score, row_before, 0)
                score = gl.maximum(score, gl.where(n[:, None] == 0, previous, moved))
                score = gl.where(early, -1.0, score)
                previous = moved
            if place == WINDOWS.PER_BLOCK - 1:
                listed = (block + n >= run.first_block) & (block + n < run.num_scored)
                score = gl.minimum(score, 3.4028234663852886e38)
                base = out_row * out.columns + block
                gl.store(out.ptr + base + at, score, mask=listed[:, None] & exists)
                if SEGMENT > 0:
                    _store_segments(out, base // SEGMENT, segments, score, block, run, SEGMENT)
                score = unscored


@gluon.jit(do_not_specialize=scores.VARYING)
def score_hopper_kernel(
    q,
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
    SIZES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fill the scores of a tile for a run of blocks, as ``score_kernel`` does."""
    RULE: gl.constexpr = SIZES.RULE
    PART: gl.constexpr = SIZES.PART
    TILE: gl.constexpr = SIZES.TILE
    chunk = documents.ChunkRows(head_start, num_heads, row_start, row_end, q_offset)
    table = documents.Documents(documents_ptr, num_parts, part_start)
    place = _locate_tile(chunk, table, Hkv, splits, SIZES)
    rows = place.rows
    if PART.SIZE > 0:
        C -= rows.seq_start // RULE.kernel_stride
    run = _cut_run(place, split_blocks, RULE)
    if place.needs_no_scores | (run.first_block >= run.num_scored):
        return

    steps = locate_steps(run, rows, C, SIZES)
    COLUMNS: gl.constexpr = TILE.HEADS * TILE.TOKENS  # head after head: their sum stays in a thread
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    part_block = rows.seq_start // RULE.block_size
    pipeline = start_pipeline(steps, desc, place, part_block, SIZES, STAGES)
    queries = load_queries(q, place.b, place.h, rows.start, rows.end, desc.dtype, TILE)
    fence_async_shared()
    lse_ptr += (place.head.to(gl.int64) * lse_tiles + lse_tile + place.tile) * COLUMNS
    shift = _load_shift(lse_ptr, qk_scale_log2, LOGITS, TILE)
    scored = _Scored(queries, rows, C, shift, qk_scale_log2)
    _score_run(pipeline, scored, run, out, place.out_row, LOGITS, SIZES)
