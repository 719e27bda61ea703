"""Score blocks for tiles of queries: weights of windows, summed over the group, pooled on chip.

A row's bits depend on its position and on what it sees alone: the tile's shape is fixed by dtype,
head dim and group, and every reduction runs over fixed groups of keys in a fixed order.
"""

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.select_blocks.documents import locate_tile
from infllm_flex_ops.selection.kernels.window_sums import count_windows
from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32

VARYING = ["first_head", "num_heads", "first_row", "end_row", "offset", "C"]
VARYING += ["split_blocks", "splits", "lse_tile", "lse_tiles", "num_parts", "first_part"]


@triton.jit(do_not_specialize=VARYING)
def score_kernel(
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
    G: tl.constexpr,
    D: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    DENSE: tl.constexpr,
    PART: tl.constexpr,
    PART_ROWS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
    TAIL: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP32: tl.constexpr,
    USE_TMA: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Fill ``scores [num_heads, rows, columns]``: a tile, a run of blocks each.

    A score is the best of the windows that begin in the block, and of the last ``TAIL`` of those
    that begin in the block before. The best of every ``SEGMENT`` blocks goes to
    ``bests [num_heads, rows, columns // SEGMENT]``; 0: nowhere.
    """
    tiles = tl.cdiv(end_row - first_row, TOKENS)
    head = tl.program_id(0) % num_heads
    split = tl.program_id(0) // num_heads % splits
    tile = tiles - 1 - tl.program_id(0) // num_heads // splits
    first = first_row + tile * TOKENS
    num_rows = end_row - first_row
    out_row = head.to(tl.int64) * num_rows + tile * TOKENS + tl.arange(0, TOKENS)
    b = ((first_head + head) // Hkv).to(tl.int64)
    h = ((first_head + head) % Hkv).to(tl.int64)
    dense = DENSE
    first_window = 0
    if PART > 0:
        first, begin, end_row, budget = locate_tile(
            documents_ptr + b * num_parts * 3, first, first_part, offset, PART, PART_ROWS
        )
        offset -= begin
        dense = budget * BLOCK_SIZE
        first_window = begin // KERNEL_STRIDE
        keys_ptr += first_window.to(tl.int64) * stride_ks
        C -= first_window
    last_position = offset + tl.minimum(first + TOKENS, end_row) - 1
    num_scored = last_position // BLOCK_SIZE - LOCAL_BLOCKS  # the blocks after these are forced
    if (last_position < dense) | (first >= end_row) | (split * split_blocks >= num_scored):
        return
    column = tl.arange(0, HEADS * TOKENS)  # heads outer, so that their sum stays in a thread
    group = column // TOKENS
    row = first + column % TOKENS
    d = tl.arange(0, BLOCK_D)
    q_row = b * stride_qb + (h * G + group) * stride_qh + row.to(tl.int64) * stride_qs
    q_ptr += q_row[None, :]
    q_mask = ((group < G) & (row < end_row))[None, :]
    if not FP32:
        q = tl.load(q_ptr + d[:, None] * stride_qd, mask=q_mask & (d < D)[:, None], other=0.0)
    lse_ptr += (head.to(tl.int64) * lse_tiles + lse_tile + tile) * (HEADS * TOKENS)
    shift = -factor * tl.load(lse_ptr + column)[None, :]

    keys_ptr += b * stride_kb + h * stride_kh
    token = first + tl.arange(0, TOKENS)
    out_row *= columns
    n = tl.arange(0, BLOCK_N)
    slot = n % SLOTS
    block_slot = tl.arange(0, BLOCK_N // SLOTS)
    STEP: tl.constexpr = BLOCK_N // SLOTS
    first_block = split * split_blocks
    end_block = tl.minimum(first_block + split_blocks, num_scored)
    begin_block = first_block
    if TAIL > 0:  # the first block of the run needs the one before
        begin_block = tl.maximum(first_block - STEP, 0)
    inner_end = begin_block
    # Float32 leaves no registers for a second loop, and windows of other blocks need the tests.
    ALL_EDGE: tl.constexpr = FP32 or SLOTS != PER_BLOCK
    if not ALL_EDGE:  # every row sees all of these blocks' windows
        whole = count_windows(offset + first, KERNEL_SIZE, KERNEL_STRIDE, C) // PER_BLOCK
        inner_end += tl.maximum(tl.minimum(end_block, whole) - begin_block, 0) // STEP * STEP
    previous = tl.full([STEP, TOKENS], -1.0, tl.float32)  # row 0: of the block before the step
    from_row = ((block_slot + STEP - 1) % STEP)[:, None] + tl.zeros([STEP, TOKENS], tl.int32)
    for EDGE in tl.static_range(1 if ALL_EDGE else 0, 2):
        for start in tl.range(
            inner_end if EDGE else begin_block, end_block if EDGE else inner_end, STEP
        ):
            window = (start + n // SLOTS) * PER_BLOCK + slot - BEFORE
            valid = (window >= 0) & (window < C) & (slot < PER_BLOCK + BEFORE)
            key_ptr = keys_ptr + window.to(tl.int64)[:, None] * stride_ks
            if FP32:
                logits = dot_fp32(
                    key_ptr, valid[:, None], stride_kd, q_ptr, q_mask, stride_qd, D, BLOCK_D
                )
            elif USE_TMA:
                at = first_window + start * PER_BLOCK
                keys = boxes.load([b.to(tl.int32), h.to(tl.int32), at, 0])
                logits = tl.dot(keys.reshape(BLOCK_N, BLOCK_D), q)
            else:
                mask = valid[:, None] & (d < D)[None, :]
                keys = tl.load(key_ptr + d[None, :] * stride_kd, mask=mask, other=0.0)
                logits = tl.dot(keys, q)
            # One rounding, in every kernel that scores alike: equal products stay equal.
            weights = tl.exp2(tl.fma(logits, factor, shift))
            if HEADS > G:
                weights = tl.where((group < G)[None, :], weights, 0.0)
            weight = tl.sum(tl.reshape(weights, [BLOCK_N, HEADS, TOKENS]), 1)
            weight = tl.minimum(tl.maximum(weight, 0.0), 3.4028234663852886e38)  # nan: 0
            if EDGE:
                window_end = window * KERNEL_STRIDE + KERNEL_SIZE - 1
                seen = valid[:, None] & (window_end[:, None] <= offset + token[None, :])
                weight = tl.where(seen, weight, -1.0)

            score = tl.max(tl.reshape(weight, [STEP, SLOTS, TOKENS]), 1)
            if TAIL > 0:  # the windows that reach into the next block, moved there
                tail = tl.where((slot >= PER_BLOCK - TAIL)[:, None], weight, -1.0)
                tail = tl.max(tl.reshape(tail, [STEP, SLOTS, TOKENS]), 1)
                moved = tl.gather(tail, from_row, 0)
                score = tl.maximum(score, tl.where(block_slot[:, None] == 0, previous, moved))
                previous = moved
            block = start + block_slot
            out = out_row[None, :] + block[:, None]
            listed = (block >= first_block) & (block < num_scored)
            tl.store(scores_ptr + out, score, mask=listed[:, None] & (token < end_row)[None, :])
            if SEGMENT > 0:
                SEGMENTS: tl.constexpr = STEP // SEGMENT
                best = tl.max(tl.reshape(score, [SEGMENTS, SEGMENT, TOKENS]), 1)
                block = start + tl.arange(0, SEGMENTS) * SEGMENT
                listed = (block >= first_block) & (block < num_scored)
                out = (out_row[None, :] + block[:, None]) // SEGMENT
                tl.store(bests_ptr + out, best, mask=listed[:, None] & (token < end_row)[None, :])
