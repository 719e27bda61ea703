"""Select the best blocks of a row: the threshold of its K-th score, found by counting, no sort."""

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.prefill.documents import locate_rows
from infllm_flex_ops.selection.kernels.prefill.plan import SEGMENT_BLOCKS

SEGMENT = tl.constexpr(SEGMENT_BLOCKS)

_VARYING = ["head_start", "row_start", "row_end", "q_offset", "Sq", "K", "num_parts", "part_start"]


@triton.jit
def _log_of_count(count):
    """Roughly the logarithm, up to a factor and a summand, for interpolation: a float's own bits.

    A count of 0 is taken as 0.5.
    """
    return tl.maximum(count.to(tl.float32), 0.5).to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def _find_threshold(key, low, high, num_low, num_high, K):
    """Narrow ``low`` and ``high``, which ``num_low`` >= K and ``num_high`` < K keys reach.

    Returns:
        The threshold ``low`` and the number of keys that reach it.
    """
    N: tl.constexpr = key.shape[0]
    log_k = _log_of_count(K + tl.zeros([], tl.int32))
    log_low = _log_of_count(num_low)
    log_high = _log_of_count(num_high)
    step = 0
    while (num_low > K) & (high - low > 1):
        is_close = num_low - num_high <= 3
        if is_close:  # the threshold is one of three keys, perhaps tied
            below = (key - high).to(tl.uint32, bitcast=True)  # negative ones become the largest
            trial = high + tl.max(below, 0).to(tl.int32, bitcast=True)
        else:
            fraction = 0.5  # every third step halves, whatever the distribution
            if step % 3 != 2:  # the others assume that the logarithm of the count falls evenly
                fraction = (log_low - log_k) / (log_low - log_high)
            trial = low + ((high - low).to(tl.float32) * fraction).to(tl.int32)
            trial = tl.minimum(tl.maximum(trial, low + 1), high - 1)
        reach = N + tl.sum((key - trial) >> 31, 0)
        log_reach = _log_of_count(reach)
        reached = reach >= K
        low = tl.where(reached, trial, low)
        num_low = tl.where(reached, reach, num_low)
        high = tl.where(reached, tl.where(is_close, trial + 1, high), trial)
        num_high = tl.where(reached, num_high, reach)
        log_low = tl.where(reached, log_reach, log_low)
        log_high = tl.where(reached, log_high, log_reach)
        step += 1
    return low, num_low


@triton.jit
def _divide_interval(key, low, high, num_low, num_high, K):
    """Narrow as ``_find_threshold`` does, in fewer rounds that count more.

    A round divides the interval into equal parts, as many as have their inner borders counted in
    one sum, a field of bits each.
    """
    N: tl.constexpr = key.shape[0]
    BITS: tl.constexpr = 10 if N < 1024 else 16  # of a count
    PARTS: tl.constexpr = 32 // BITS + 1
    while (num_low > K + 1) & (num_high < K - 1) & (high - low > 1):
        part = tl.maximum((high - low) // PARTS, 1)
        below = tl.zeros([N], tl.int32)
        for i in tl.static_range(1, PARTS):
            sign = (key - (low + i * part)).to(tl.uint32, bitcast=True) >> 31
            below += sign.to(tl.int32) << (i - 1) * BITS
        below = tl.sum(below, 0)
        reached = tl.zeros([], tl.int32)
        for i in tl.static_range(1, PARTS):
            reach = N - ((below >> (i - 1) * BITS) & ((1 << BITS) - 1))
            is_reached = reach >= K
            reached += is_reached.to(tl.int32)
            num_low = tl.where(is_reached, reach, num_low)
            num_high = tl.where(is_reached, num_high, tl.maximum(num_high, reach))
        low += reached * part
        high = tl.where(reached < PARTS - 1, tl.minimum(low + part, high), high)
    if (num_low > K) & (high - low > 1):  # the best or the worst of those between, perhaps tied
        is_best = num_high == K - 1
        if is_best:
            from_high = (key - high).to(tl.uint32, bitcast=True)  # negative ones are the largest
            trial = high + tl.max(from_high, 0).to(tl.int32, bitcast=True)
        else:
            from_low = (key - low).to(tl.uint32, bitcast=True)
            trial = low + tl.min(from_low, 0).to(tl.int32, bitcast=True) + 1
        reach = N + tl.sum((key - trial) >> 31, 0)
        low = tl.where(reach >= K, trial, trial - 1)
        num_low = tl.where(reach >= K, reach, num_low)
    return low, num_low


@triton.jit
def topk_blocks(
    score,
    block,
    last,
    count,
    K,
    INIT_BLOCKS: tl.constexpr,
    FORCE_LAST: tl.constexpr,
    FEW_ROUNDS: tl.constexpr = False,
):
    """Mark the K best of at least K blocks: forced blocks, then by score, the lowest at ties.

    Args:
        score: ``[N]``, below 0 where there is none.
        block: ``[N]``, the blocks' numbers, ascending.
        last: Blocks after this one do not count.
        count: Number of blocks that count.
        K: Budget.
        INIT_BLOCKS: Blocks before this one are forced; all of them are listed.
        FORCE_LAST: Whether the last one is forced.
        FEW_ROUNDS: Whether a round of the search counts at several thresholds: for few rows, which
            wait for every round. One threshold a round counts least.
    """
    # Non-negative floats order as their bits do: unscored 0, scores from 1 up, forced above all.
    key = tl.maximum(score.to(tl.int32, bitcast=True), -1) + 1
    key = tl.where(block < INIT_BLOCKS, 0x7FFFFFFF, key)
    if FORCE_LAST:
        key = tl.where(block >= last, 0x7FFFFFFF, key)
    key = tl.where(block <= last, key, -1)

    # Find the largest threshold that at least K keys reach, or any that exactly K reach. At least K
    # keys reach `low` and fewer reach `high`; the next threshold lies where the counts suggest.
    # Comparisons and selections take twice as many of the scarcest instructions as sums and signs
    # do. As unsigned numbers -1 is the largest; as signed ones, forced keys + 1 are negative.
    bits = key.to(tl.uint32, bitcast=True)
    low = tl.min(bits, 0).to(tl.int32, bitcast=True)
    high = tl.max((bits + 1).to(tl.int32, bitcast=True), 0)
    num_low = count
    num_high = tl.minimum(INIT_BLOCKS + FORCE_LAST, count)  # the forced ones
    if num_high >= K:
        low = 0x7FFFFFFF
        num_low = num_high
        high = low
    if FEW_ROUNDS:
        low, num_low = _divide_interval(key, low, high, num_low, num_high, K)
    else:
        low, num_low = _find_threshold(key, low, high, num_low, num_high, K)
    if num_low > K:  # ties at the threshold: the lowest blocks
        room = K - tl.sum((key > low).to(tl.int32), 0)
        tied = key == low
        key = tl.where(tied & (tl.cumsum(tied.to(tl.int32), 0) > room), -1, key)
    return key >= low


@triton.jit
def write_blocks(out_ptr, selected, fours):
    """Write the numbers of the selected blocks; ``fours [N // 4]`` is the first of every four."""
    # Slots are counted over fours and then within them: fewer sums pass from lane to lane.
    N: tl.constexpr = selected.shape[0]
    bits = tl.reshape(selected.to(tl.int32), [N // 4, 4])
    count = tl.sum(bits, 1)
    word = tl.sum(bits << tl.arange(0, 4)[None, :], 1)
    slot = tl.cumsum(count, 0) - count
    for i in tl.static_range(4):
        bit = (word >> i) & 1
        tl.store(out_ptr + slot, fours + i, mask=bit != 0)
        slot += bit


@triton.jit
def _topk_segments(
    segment_ptr,
    out_ptr,
    last,
    K,
    budget,
    INIT_BLOCKS: tl.constexpr,
    TAKEN: tl.constexpr,
    N: tl.constexpr,
):
    """List the segments ``[TAKEN]`` that hold the ``budget`` best blocks up to ``last``, ascending.

    The blocks selected by score lie in at most as many segments: those with the best best scores,
    the lowest at ties. A block in another segment is worse than the best block of each of these.
    The last segment is always taken, since its best score may be that of a later block, and so are
    the segments of the forced blocks.

    Returns:
        The segments, padded with the one after the last, and the number of blocks in them that
        count. ``out``, K slots, passes them from thread to thread.
    """
    FORCED: tl.constexpr = (INIT_BLOCKS + SEGMENT - 1) // SEGMENT
    segment = tl.arange(0, N // SEGMENT)
    end = last // SEGMENT
    taken = tl.maximum(budget - INIT_BLOCKS, 0) + FORCED + 1
    taken = tl.minimum(tl.minimum(taken, end + 1), K)
    best = tl.load(segment_ptr + segment, mask=segment < (end + 4) // 4 * 4, other=-1.0)
    selected = topk_blocks(best, segment, end, end + 1, taken, FORCED, True)
    write_blocks(out_ptr, selected, tl.arange(0, N // SEGMENT // 4) * 4)
    tl.debug_barrier()
    slot = tl.arange(0, TAKEN)
    segment = tl.load(out_ptr + slot, mask=slot < taken, other=end + 1)
    tl.debug_barrier()
    # If the slots hold only the first segments, the last one is not among them.
    after_last = tl.where(taken > tl.minimum(FORCED, end), SEGMENT - 1 - last % SEGMENT, 0)
    return segment, taken * SEGMENT - after_last


@triton.jit(do_not_specialize=_VARYING)
def topk_kernel(
    scores,
    out_ptr,
    documents_ptr,
    head_start,
    row_start,
    row_end,
    q_offset,
    Sq,
    K,
    Hkv,
    num_parts,
    part_start,
    BLOCK_SIZE: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAKEN: tl.constexpr,
    N: tl.constexpr,
):
    """Write one row's blocks, ascending: forced blocks, then the best scored, lowest at ties.

    Only the ``TAKEN`` segments of a long row with the best scores are read; 0 reads the whole row.
    """
    num_rows = row_end - row_start
    head = (tl.program_id(0) // num_rows).to(tl.int64)
    row = tl.program_id(0) % num_rows
    b = (head_start + head) // Hkv
    rows = locate_rows(
        documents_ptr + b * num_parts * 3, row_start + row, row_end, q_offset, part_start, K, PART
    )
    own = (rows.q_offset + rows.start) // BLOCK_SIZE
    first_block = rows.seq_start // BLOCK_SIZE
    budget = rows.budget
    num_slots = K
    if PART.SIZE > 0:
        own = tl.where(rows.start < rows.end, own, -1)
        budget = tl.minimum(budget, K)
        is_padding = (row_start + row) % PART.ROWS >= PART.SIZE  # fills a part's last tile
        num_slots = tl.where(is_padding, 0, K)
        own = tl.where(is_padding, -1, own)
    out_ptr += ((head_start + head) * Sq + rows.start) * K
    slot = tl.arange(0, BLOCK_K)
    if own < budget:  # every block fits
        blocks = tl.where(slot <= own, first_block + slot, -1)
        tl.store(out_ptr + slot, blocks, mask=slot < num_slots)
        return

    num_scored = tl.maximum(own - LOCAL_BLOCKS, 0)  # later blocks are forced if the first ones fit
    free = tl.maximum(budget - LOCAL_BLOCKS - 1, tl.minimum(INIT_BLOCKS, budget))
    free = tl.minimum(free, num_scored)
    at = (head * num_rows + row) * (scores.columns // 64) * 64  # rows start aligned
    if TAKEN > 0:
        segment_ptr = scores.segment_ptr + (head * num_rows + row) * (scores.columns // 64) * (
            64 // SEGMENT
        )
        segment, count = _topk_segments(
            segment_ptr, out_ptr, num_scored - 1, K, free, INIT_BLOCKS, TAKEN, N
        )
        block = segment[:, None] * SEGMENT
        mask = block < num_scored
        block += tl.arange(0, SEGMENT)[None, :]
        score = tl.load(scores.ptr + at + block, mask=mask, other=-1.0)
        block = tl.reshape(block, [TAKEN * SEGMENT])
        score = tl.reshape(score, [TAKEN * SEGMENT])
        fours = segment[:, None] * SEGMENT + tl.arange(0, SEGMENT // 4)[None, :] * 4
        fours = tl.reshape(fours, [TAKEN * SEGMENT // 4])
    else:
        block = tl.arange(0, N)
        fours = tl.arange(0, N // 4) * 4
        count = num_scored
        # Rows begin at multiples of 64 and have room for one: no load reads a single block.
        mask = block < (num_scored + 15) // 16 * 16
        score = tl.load(scores.ptr + at + block, mask=mask, other=-1.0)
    selected = topk_blocks(score, block, num_scored - 1, count, free, INIT_BLOCKS, False)
    write_blocks(out_ptr, selected, first_block + fours)
    local = tl.where(slot < budget, first_block + num_scored + slot - free, -1)
    tl.store(out_ptr + slot, local, mask=(slot >= free) & (slot < K))
