"""Score blocks for tiles of queries: weights of windows, summed over the group, pooled on chip.

A row's bits depend only on its position and on the keys it sees: the tile's shape is fixed by
dtype, head dim and group, and every reduction runs over fixed groups of keys in a fixed order.
"""

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.kernel_args import HeadKeys, Run, view_head
from infllm_flex_ops.selection.kernels.online_softmax import count_windows
from infllm_flex_ops.selection.kernels.prefill.documents import locate_rows
from infllm_flex_ops.selection.kernels.prefill.queries import load_query_columns
from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32

VARYING = ["head_start", "num_heads", "row_start", "row_end", "q_offset", "C"]
VARYING += ["split_blocks", "splits", "lse_tile", "lse_tiles", "num_parts", "part_start"]


@triton.jit
def _weigh_windows(
    queries,
    keys,
    block,
    C,
    shift,
    position,
    qk_scale_log2,
    RULE: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILE: tl.constexpr,
    USE_TMA: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Weigh the windows of some blocks, summed over the group: ``[BLOCK_N, TOKENS]``.

    Args:
        queries: Columns of a tile.
        keys: Compressed keys of one KV head.
        block: The first block.
        C: Windows of the sequence.
        shift: Minus the normaliser of each column.
        position: Position of each token.
        qk_scale_log2: Factor on the logits.
        RULE: Windows and blocks.
        WINDOWS: Windows that are scored for a block.
        TILE: Sizes of the program.
        USE_TMA: Load by the descriptor.
        EDGE: Some windows may be invisible: they weigh -1.
    """
    n = tl.arange(0, TILE.BLOCK_N)
    slot = n % WINDOWS.SLOTS
    window = (block + n // WINDOWS.SLOTS) * WINDOWS.PER_BLOCK + slot - WINDOWS.BEFORE
    in_block = slot < WINDOWS.PER_BLOCK + WINDOWS.BEFORE
    valid = (window >= 0) & (window < C) & in_block
    key_ptr = keys.view.ptr + window.to(tl.int64)[:, None] * keys.view.s
    if TILE.FP32:
        logits = dot_fp32(
            key_ptr,
            valid[:, None],
            keys.view.d,
            queries.ptr,
            queries.mask,
            queries.d,
            TILE.D,
            TILE.BLOCK_D,
        )
    elif USE_TMA:
        box = keys.desc.load([keys.b, keys.h, keys.start + block * WINDOWS.PER_BLOCK, 0])
        logits = tl.dot(box.reshape(TILE.BLOCK_N, TILE.BLOCK_D), queries.loaded)
    else:
        d = tl.arange(0, TILE.BLOCK_D)
        mask = valid[:, None] & (d < TILE.D)[None, :]
        x = tl.load(key_ptr + d[None, :] * keys.view.d, mask=mask, other=0.0)
        logits = tl.dot(x, queries.loaded)
    # One rounding, in every kernel with the same scores: equal products stay equal.
    weights = tl.exp2(tl.fma(logits, qk_scale_log2, shift))
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
def _score_run(
    queries,
    keys,
    run,
    rows,
    C,
    shift,
    out,
    out_row,
    qk_scale_log2,
    RULE: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILE: tl.constexpr,
    USE_TMA: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Score a run of blocks for a tile and store the scores.

    Args:
        queries: Columns of the tile.
        keys: Compressed keys of one KV head.
        run: The blocks.
        rows: The tile's rows.
        C: Windows of the sequence.
        shift: Minus the normaliser of each column.
        out: Where scores go.
        out_row: Where each token's row begins there.
        qk_scale_log2: Factor on the logits.
        RULE: Windows and blocks.
        WINDOWS: Windows that are scored for a block.
        TILE: Sizes of the program.
        USE_TMA: Load by the descriptor.
        SEGMENT: Blocks of a segment, or 0.
    """
    STEP: tl.constexpr = TILE.BLOCK_N // WINDOWS.SLOTS
    begin = run.first_block
    if WINDOWS.TAIL > 0:  # the first block needs the tail of the one before the run
        begin = tl.maximum(run.first_block - STEP, 0)
    inner_end = begin
    # Float32 leaves no registers for a second loop, and windows of other blocks need the tests.
    ALL_EDGE: tl.constexpr = TILE.FP32 or WINDOWS.SLOTS != WINDOWS.PER_BLOCK
    if not ALL_EDGE:  # every row sees all windows of these blocks
        whole = count_windows(rows.q_offset + rows.start, RULE.kernel_size, RULE.kernel_stride, C)
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
            weight = _weigh_windows(
                queries,
                keys,
                block,
                C,
                shift,
                rows.q_offset + token,
                qk_scale_log2,
                RULE,
                WINDOWS,
                TILE,
                USE_TMA,
                EDGE,
            )
            score = tl.max(tl.reshape(weight, [STEP, WINDOWS.SLOTS, TILE.TOKENS]), 1)
            if WINDOWS.TAIL > 0:  # move the windows that reach into the next block there
                in_tail = (slot >= WINDOWS.PER_BLOCK - WINDOWS.TAIL)[:, None]
                tail = tl.where(in_tail, weight, -1.0)
                tail = tl.max(tl.reshape(tail, [STEP, WINDOWS.SLOTS, TILE.TOKENS]), 1)
                moved = tl.gather(tail, row_before, 0)
                score = tl.maximum(score, tl.where(block_slot[:, None] == 0, previous, moved))
                previous = moved
            _store_scores(out, out_row, token < rows.end, score, block, run, SEGMENT)


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
    RULE: tl.constexpr,
    PART: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILE: tl.constexpr,
    USE_TMA: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Fill the scores of a tile for a run of blocks.

    A score is the best of the windows that begin in the block and of the last ``WINDOWS.TAIL`` of
    those that begin in the block before. The best of every ``SEGMENT`` blocks is stored as well; 0
    stores none.
    """
    tiles = tl.cdiv(row_end - row_start, TILE.TOKENS)
    head = tl.program_id(0) % num_heads
    split = tl.program_id(0) // num_heads % splits
    tile = tiles - 1 - tl.program_id(0) // num_heads // splits
    num_rows = row_end - row_start
    out_row = head.to(tl.int64) * num_rows + tile * TILE.TOKENS + tl.arange(0, TILE.TOKENS)
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
    window_start = rows.seq_start // RULE.kernel_stride
    if PART.SIZE > 0:
        C -= window_start
    last_position = rows.q_offset + tl.minimum(rows.start + TILE.TOKENS, rows.end) - 1
    # Later blocks are forced.
    num_scored = last_position // RULE.block_size - RULE.local_blocks
    is_full = last_position < rows.budget * RULE.block_size
    if is_full | (rows.start >= rows.end) | (split * split_blocks >= num_scored):
        return
    column = tl.arange(0, TILE.HEADS * TILE.TOKENS)
    column_token = rows.start + column % TILE.TOKENS
    queries = load_query_columns(q, b, h, column_token, column_token < rows.end, TILE)
    lse_ptr += (head.to(tl.int64) * lse_tiles + lse_tile + tile) * (TILE.HEADS * TILE.TOKENS)
    shift = -qk_scale_log2 * tl.load(lse_ptr + column)[None, :]

    first_block = split * split_blocks
    run = Run(first_block, tl.minimum(first_block + split_blocks, num_scored), num_scored)
    keys_view = view_head(keys, b, h, window_start, PART)
    _score_run(
        queries,
        HeadKeys(keys_view, desc, b.to(tl.int32), h.to(tl.int32), window_start),
        run,
        rows,
        C,
        shift,
        out,
        out_row * out.columns,
        qk_scale_log2,
        RULE,
        WINDOWS,
        TILE,
        USE_TMA,
        SEGMENT,
    )
