"""The scores of ``scores.py`` on Hopper, with the same bits, a window of every block at a time.

A step multiplies the tile with one window of each of 64 blocks, the next step with another window
of the same blocks: the best of a block's windows is then found within a thread, where ``scores.py``
passes every weight from lane to lane. The copy engine fetches such rows as one box. Written in
Gluon, the language below Triton, since Triton lays the scores out anew in every step.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from infllm_flex_ops.selection.kernels import window_sums
from infllm_flex_ops.selection.kernels.select_blocks import documents, scores

STEP = gl.constexpr(64)  # blocks, a row each of a matrix instruction

_count_windows = gluon.jit(window_sums.count_windows.fn)
_locate_tile = gluon.jit(documents.locate_tile.fn)


@gluon.jit
def _find(i, run, SLOTS: gl.constexpr, TAIL: gl.constexpr):
    """Say of step ``i`` its first block, which of their windows it takes, and as the how-many-th.

    The windows that reach into the next block come first: those of the blocks before the run too.
    """
    early = i < run
    turn = gl.where(early, i - run + TAIL, i % SLOTS)
    start = gl.where(early, run // SLOTS * STEP - STEP, i // SLOTS * STEP)
    return start, (turn + SLOTS - TAIL) % SLOTS, turn, early


@gluon.jit
def _fetch(
    i,
    begin,
    end,
    run,
    boxes,
    b,
    h,
    first_block,
    ring,
    full,
    SLOTS: gl.constexpr,
    TAIL: gl.constexpr,
    RING: gl.constexpr,
):
    """Have the windows of step ``i`` brought into the ring."""
    start, slot, _, _ = _find(i, run, SLOTS, TAIL)
    place = (i - begin) % RING
    BYTES: gl.constexpr = ring.shape[3] * ring.shape[5] * ring.dtype.primitive_bitwidth // 8
    at = [b, h, first_block + start, slot, 0]
    bar = full.index(place)
    mbarrier.expect(bar, BYTES, pred=i < end)
    tma.async_copy_global_to_shared(boxes, at, bar, ring.index(place), pred=i < end)


@gluon.jit(do_not_specialize=scores.VARYING)
def score_boxed_kernel(
    q_ptr,
    keys_ptr,
    boxes,
    lse_ptr,
    scores_ptr,
    bests_ptr,
    documents_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    first_head,
    num_heads,
    first_row,
    end_row,
    offset,
    C,
    columns,
    split_blocks,
    splits,
    lse_tile,
    lse_tiles,
    factor,
    Hkv,
    num_parts,
    first_part,
    G: gl.constexpr,
    D: gl.constexpr,
    KERNEL_SIZE: gl.constexpr,
    KERNEL_STRIDE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    LOCAL_BLOCKS: gl.constexpr,
    DENSE: gl.constexpr,
    PART: gl.constexpr,
    PART_ROWS: gl.constexpr,
    SLOTS: gl.constexpr,
    TAIL: gl.constexpr,
    BLOCK_D: gl.constexpr,
    HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    RING: gl.constexpr,
    SEGMENT: gl.constexpr,
):
    """Fill ``scores [num_heads, rows, columns]`` as ``score_kernel`` does, from its arguments.

    ``SLOTS`` windows begin in a block; the last ``TAIL`` of them count for the next one, too.
    """
    tiles = gl.cdiv(end_row - first_row, TOKENS)
    head = gl.program_id(0) % num_heads
    split = gl.program_id(0) // num_heads % splits
    tile = tiles - 1 - gl.program_id(0) // num_heads // splits
    first = first_row + tile * TOKENS
    out_row = head.to(gl.int64) * (end_row - first_row) + tile * TOKENS
    b = (first_head + head) // Hkv
    h = (first_head + head) % Hkv
    dense = DENSE
    part_block = 0
    if PART > 0:
        first, begin, end_row, budget = _locate_tile(
            documents_ptr + b.to(gl.int64) * num_parts * 3,
            first,
            first_part,
            offset,
            PART,
            PART_ROWS,
        )
        offset -= begin
        dense = budget * BLOCK_SIZE
        part_block = begin // BLOCK_SIZE
        C -= begin // KERNEL_STRIDE
    last_position = offset + gl.minimum(first + TOKENS, end_row) - 1
    num_scored = last_position // BLOCK_SIZE - LOCAL_BLOCKS  # the blocks after these are forced
    if (last_position < dense) | (first >= end_row) | (split * split_blocks >= num_scored):
        return

    first_block = split * split_blocks  # a multiple of STEP
    end_block = gl.minimum(first_block + split_blocks, num_scored)
    run = first_block // STEP * SLOTS
    begin = gl.maximum(run - TAIL, 0)  # the first block needs the tail of the one before the run
    end = gl.cdiv(end_block, STEP) * SLOTS
    # Every row sees all windows of the blocks up to here: all that are listed, or whole steps.
    whole = _count_windows(offset + first, KERNEL_SIZE, KERNEL_STRIDE, C) // SLOTS
    inner_end = gl.maximum(begin, whole // STEP * SLOTS)
    inner_end = gl.where(whole >= end_block, end, inner_end)

    dtype: gl.constexpr = boxes.dtype
    COLUMNS: gl.constexpr = HEADS * TOKENS  # heads outer, so that their sum stays in a thread
    ring = gl.allocate_shared_memory(dtype, [RING, 1, 1, STEP, 1, BLOCK_D], boxes.layout)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for step in gl.static_range(RING):
        mbarrier.init(full.index(step), count=1)
    fence_async_shared()
    for step in gl.static_range(RING):
        _fetch(
            begin + step, begin, end, run, boxes, b, h, part_block, ring, full, SLOTS, TAIL, RING
        )

    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, BLOCK_D], dtype)
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    column = gl.arange(0, COLUMNS, gl.SliceLayout(1, LOADED))
    row = first + column % TOKENS
    d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LOADED))
    q_row = b.to(gl.int64) * stride_qb + (h * G + column // TOKENS).to(gl.int64) * stride_qh
    q_row += row.to(gl.int64) * stride_qs
    mask = ((column // TOKENS < G) & (row < end_row))[:, None] & (d < D)[None, :]
    q = gl.load(q_ptr + q_row[:, None] + d[None, :] * stride_qd, mask=mask, other=0.0)
    q = gl.allocate_shared_memory(dtype, [COLUMNS, BLOCK_D], SHARED, q).permute((1, 0))
    fence_async_shared()
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, LOGITS))
    real = (column // TOKENS < G)[None, :]
    lse_ptr += (head.to(gl.int64) * lse_tiles + lse_tile + tile) * COLUMNS
    # Where it waits for its turn without taking registers.
    shift = -factor * gl.load(lse_ptr + column)
    shift = gl.allocate_shared_memory(
        gl.float32, [COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0]), shift
    )

    no_logits = gl.zeros([STEP, COLUMNS], gl.float32, LOGITS)
    summed = gl.sum(no_logits.reshape([STEP, HEADS, TOKENS]), 1)
    SCORES: gl.constexpr = summed.type.layout
    n = gl.arange(0, STEP, gl.SliceLayout(1, SCORES))
    token = first + gl.arange(0, TOKENS, gl.SliceLayout(0, SCORES))
    written = (token < end_row)[None, :]
    out = ((token - first) * columns)[None, :] + n[:, None]
    row_before = ((n + STEP - 1) % STEP)[:, None] + gl.zeros([STEP, TOKENS], gl.int32, SCORES)
    unscored = gl.full([STEP, TOKENS], -1.0, gl.float32, SCORES)
    if SEGMENT > 0:  # of a warp's rows, a segment, each thread collects its tokens' own
        ACROSS: gl.constexpr = 32 // gl.constexpr(min(32, TOKENS))
        COLLECTED: gl.constexpr = gl.BlockedLayout(
            [1, 1, 1], [1, ACROSS, 32 // ACROSS], [4, 1, 1], [2, 1, 0]
        )
        BESTS: gl.constexpr = gl.SliceLayout(1, COLLECTED)
        segment = gl.arange(0, STEP // SEGMENT, gl.SliceLayout(1, BESTS))
        best_token = gl.arange(0, TOKENS, gl.SliceLayout(0, BESTS))
        best_out = (best_token * (columns // SEGMENT))[None, :] + segment[:, None]
    score = unscored
    previous = unscored  # row 0: of the block before the step's
    for EDGE in gl.static_range(2):
        for i in range(inner_end if EDGE else begin, end if EDGE else inner_end):
            start, slot, turn, early = _find(i, run, SLOTS, TAIL)
            place = (i - begin) % RING
            mbarrier.wait(full.index(place), (i - begin) // RING & 1)
            keys = ring.index(place).reshape([STEP, BLOCK_D])
            logits = warpgroup_mma(keys, q, no_logits, use_acc=False, is_async=True)
            logits = warpgroup_mma_wait(0, deps=[logits])
            _fetch(
                i + RING, begin, end, run, boxes, b, h, part_block, ring, full, SLOTS, TAIL, RING
            )
            weights = gl.exp2(
                gl.fma(logits, factor, shift.load(gl.SliceLayout(0, LOGITS))[None, :])
            )
            if HEADS > G:
                weights = gl.where(real, weights, 0.0)
            weight = gl.sum(weights.reshape([STEP, HEADS, TOKENS]), 1)
            weight = gl.maximum(weight, 0.0)  # nan: 0
            if EDGE:
                window = (start + n) * SLOTS + slot
                window_end = window * KERNEL_STRIDE + KERNEL_SIZE - 1
                seen = (window < C)[:, None] & (window_end[:, None] <= offset + token[None, :])
                weight = gl.where(seen, weight, -1.0)
            score = gl.maximum(score, weight)
            if turn == TAIL - 1:  # these windows reach into the next block: moved there
                moved = gl.gather(score, row_before, 0)
                score = gl.maximum(score, gl.where(n[:, None] == 0, previous, moved))
                score = gl.where(early, -1.0, score)
                previous = moved
            if turn == SLOTS - 1:
                block = start + n
                listed = ((block >= first_block) & (block < num_scored))[:, None] & written
                score = gl.minimum(score, 3.4028234663852886e38)
                gl.store(scores_ptr + (out_row * columns + start) + out, score, mask=listed)
                if SEGMENT > 0:
                    best = gl.max(score.reshape([STEP // SEGMENT, 2, SEGMENT // 2, TOKENS]), 1)
                    best = gl.max(gl.convert_layout(best, COLLECTED), 1)
                    block = start + segment * SEGMENT
                    listed = ((block >= first_block) & (block < num_scored))[:, None]
                    listed = listed & (first + best_token < end_row)[None, :]
                    gl.store(
                        bests_ptr + (out_row * columns + start) // SEGMENT + best_out,
                        best,
                        mask=listed,
                    )
                score = unscored
