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

from infllm_flex_ops.selection.kernels.kernel_args import Run
from infllm_flex_ops.selection.kernels.prefill import documents, scores
from infllm_flex_ops.selection.kernels.prefill.hopper_pipeline import (
    STEP,
    find_step,
    load_queries,
    load_step,
    locate_steps,
    start_pipeline,
)

_locate_rows = gluon.jit(documents.locate_rows.fn)


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


@gluon.jit
def _weigh_step(
    i,
    pipeline,
    q,
    shift,
    qk_scale_log2,
    LOGITS: gl.constexpr,
    WINDOWS: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Weigh the windows of step ``i``, summed over the group: ``[STEP, TOKENS]``."""
    COLUMNS: gl.constexpr = TILE.HEADS * TILE.TOKENS
    stage = (i - pipeline.begin) % STAGES
    mbarrier.wait(pipeline.full.index(stage), (i - pipeline.begin) // STAGES & 1)
    keys = pipeline.smem.index(stage).reshape([STEP, TILE.BLOCK_D])
    no_logits = gl.full([STEP, COLUMNS], 0.0, gl.float32, LOGITS)
    logits = warpgroup_mma(keys, q, no_logits, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(0, deps=[logits])
    load_step(i + STAGES, pipeline, WINDOWS, STAGES)
    shift = shift.load(gl.SliceLayout(0, LOGITS))[None, :]
    weights = gl.exp2(gl.fma(logits, qk_scale_log2, shift))
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
def _mask_invisible(weight, block, slot, n, position, C, RULE: gl.constexpr, WINDOWS: gl.constexpr):
    """Give the weight -1 to windows that end after the token's position."""
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
def _score_run(
    pipeline,
    queries,
    shift,
    rows,
    run,
    edge,
    C,
    out,
    out_row,
    qk_scale_log2,
    LOGITS: gl.constexpr,
    RULE: gl.constexpr,
    WINDOWS: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    SEGMENT: gl.constexpr,
):
    """Score a run of blocks for a tile and store the scores.

    Args:
        pipeline: Steps of the run, the first of them already on the way.
        queries: Columns of the tile, in shared memory.
        shift: Minus the normaliser of each column, in shared memory.
        rows: The tile's rows.
        run: The blocks.
        edge: First step whose windows may be invisible.
        C: Windows of the sequence.
        out: Where scores go.
        out_row: The tile's first row there.
        qk_scale_log2: Factor on the logits.
        LOGITS: Layout of the logits.
        RULE: Windows and blocks.
        WINDOWS: Windows that are scored for a block.
        TILE: Sizes of the program.
        STAGES: Stages of the pipeline.
        SEGMENT: Blocks of a segment, or 0.
    """
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
        for i in range(edge if EDGE else pipeline.begin, pipeline.end if EDGE else edge):
            block, slot, place, early = find_step(i, pipeline.run, WINDOWS)
            weight = _weigh_step(
                i, pipeline, queries, shift, qk_scale_log2, LOGITS, WINDOWS, TILE, STAGES
            )
            if EDGE:
                position = rows.q_offset + token[None, :]
                weight = _mask_invisible(weight, block, slot, n, position, C, RULE, WINDOWS)
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
    RULE: gl.constexpr,
    PART: gl.constexpr,
    WINDOWS: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    SEGMENT: gl.constexpr,
):
    """Fill the scores of a tile for a run of blocks, as ``score_kernel`` does."""
    TOKENS: gl.constexpr = TILE.TOKENS
    tiles = gl.cdiv(row_end - row_start, TOKENS)
    head = gl.program_id(0) % num_heads
    split = gl.program_id(0) // num_heads % splits
    tile = tiles - 1 - gl.program_id(0) // num_heads // splits
    out_row = head.to(gl.int64) * (row_end - row_start) + tile * TOKENS
    b = (head_start + head) // Hkv
    h = (head_start + head) % Hkv
    rows = _locate_rows(
        documents_ptr + b.to(gl.int64) * num_parts * 3,
        row_start + tile * TOKENS,
        row_end,
        q_offset,
        part_start,
        RULE.num_selected,
        PART,
    )
    if PART.SIZE > 0:
        C -= rows.seq_start // RULE.kernel_stride
    last_position = rows.q_offset + gl.minimum(rows.start + TOKENS, rows.end) - 1
    # Later blocks are forced.
    num_scored = last_position // RULE.block_size - RULE.local_blocks
    is_full = last_position < rows.budget * RULE.block_size
    if is_full | (rows.start >= rows.end) | (split * split_blocks >= num_scored):
        return

    first_block = split * split_blocks
    run = Run(first_block, gl.minimum(first_block + split_blocks, num_scored), num_scored)
    begin, edge, end, own = locate_steps(run, rows, C, RULE, WINDOWS)
    COLUMNS: gl.constexpr = TILE.HEADS * TOKENS  # head after head: their sum stays in a thread
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    part_block = rows.seq_start // RULE.block_size
    pipeline = start_pipeline(begin, end, own, desc, b, h, part_block, WINDOWS, TILE, STAGES)
    queries = load_queries(q, b, h, rows.start, rows.end, desc.dtype, TILE)
    fence_async_shared()
    lse_ptr += (head.to(gl.int64) * lse_tiles + lse_tile + tile) * COLUMNS
    shift = _load_shift(lse_ptr, qk_scale_log2, LOGITS, TILE)
    _score_run(
        pipeline,
        queries,
        shift,
        rows,
        run,
        edge,
        C,
        out,
        out_row,
        qk_scale_log2,
        LOGITS,
        RULE,
        WINDOWS,
        TILE,
        STAGES,
        SEGMENT,
    )
