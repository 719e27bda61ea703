"""Pick the best blocks of a row: the threshold of its K-th score, found by counting, no sort."""

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.select_blocks.documents import locate_tile

SEGMENT = tl.constexpr(16)  # blocks of a long row of which the best score is kept, too

_VARYING = ["first_head", "first_row", "end_row", "offset", "Sq", "K", "num_parts", "first_part"]


@triton.jit
def _log_of_count(count):
    """About the logarithm, up to a factor and a summand, for interpolation: the float's own bits.

    None counts as a half.
    """
    return tl.maximum(count.to(tl.float32), 0.5).to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def best_blocks(score, block, last, count, K, INIT_BLOCKS: tl.constexpr, FORCE_LAST: tl.constexpr):
    """Mark the K best of at least K blocks: forced ones, then by score, the lowest at ties.

    Args:
        score: ``[N]``, below 0 where there is none.
        block: ``[N]``, the blocks' numbers, ascending.
        last: Blocks after this one do not count.
        count: How many blocks do.
        K: Budget.
        INIT_BLOCKS: Blocks before this one, which are all listed, are forced.
        FORCE_LAST: Whether the last one is forced.
    """
    N: tl.constexpr = score.shape[0]
    # Non-negative floats order as their bits do: unscored 0, scores from 1 up, forced above all.
    key = tl.maximum(score.to(tl.int32, bitcast=True), -1) + 1
    key = tl.where(block < INIT_BLOCKS, 0x7FFFFFFF, key)
    if FORCE_LAST:
        key = tl.where(block >= last, 0x7FFFFFFF, key)
    key = tl.where(block <= last, key, -1)

    # The largest threshold that at least K keys reach, or any that exactly K reach: at least K
    # reach `low`, fewer reach `high`, and the gap closes where the counts suggest.
    # Comparisons and selections take twice as many of the scarcest instructions as these sums and
    # signs: as unsigned numbers -1 is the largest, and after the forced ones come negative ones.
    bits = key.to(tl.uint32, bitcast=True)
    low = tl.min(bits, 0).to(tl.int32, bitcast=True)
    high = tl.max((bits + 1).to(tl.int32, bitcast=True), 0)
    num_low = count
    num_high = tl.minimum(INIT_BLOCKS + FORCE_LAST, count)  # the forced ones
    if num_high >= K:
        low = 0x7FFFFFFF
        num_low = num_high
        high = low
    log_k = _log_of_count(K + tl.zeros([], tl.int32))
    log_low = _log_of_count(num_low)
    log_high = _log_of_count(num_high)
    step = 0
    while (num_low > K) & (high - low > 1):
        is_close = num_low - num_high <= 3
        if is_close:  # ties end here: the threshold is one of three keys
            below = (key - high).to(tl.uint32, bitcast=True)  # the negative ones are the largest
            trial = high + tl.max(below, 0).to(tl.int32, bitcast=True)
        else:
            share = 0.5  # halves now and then, whatever the distribution
            if step % 3 != 2:  # else as if the logarithm of the count fell evenly
                share = (log_low - log_k) / (log_low - log_high)
            trial = low + ((high - low).to(tl.float32) * share).to(tl.int32)
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
    if num_low > K:  # ties at the threshold: the lowest blocks
        room = K - tl.sum((key > low).to(tl.int32), 0)
        tied = key == low
        key = tl.where(tied & (tl.cumsum(tied.to(tl.int32), 0) > room), -1, key)
    return key >= low


@triton.jit
def write_blocks(out_ptr, chosen, fours):
    """Write the numbers of the chosen blocks, of which every four begin at ``fours [N // 4]``."""
    # Places are counted over fours and then within them: fewer sums pass from lane to lane.
    N: tl.constexpr = chosen.shape[0]
    bits = tl.reshape(chosen.to(tl.int32), [N // 4, 4])
    count = tl.sum(bits, 1)
    word = tl.sum(bits << tl.arange(0, 4)[None, :], 1)
    place = tl.cumsum(count, 0) - count
    for i in tl.static_range(4):
        bit = (word >> i) & 1
        tl.store(out_ptr + place, fours + i, mask=bit != 0)
        place += bit


@triton.jit
def _best_segments(
    bests_ptr,
    out_ptr,
    last,
    K,
    room,
    INIT_BLOCKS: tl.constexpr,
    TAKEN: tl.constexpr,
    N: tl.constexpr,
):
    """List the segments ``[TAKEN]`` that hold the ``room`` best blocks up to ``last``, ascending.

    As many blocks as are chosen by score lie in as many segments: those whose best are best, the
    lowest at ties. Of a block elsewhere, the best of each of these is better. The last segment is
    taken, too, since its best may be of a later block, and so are the forced blocks'.

    Returns:
        The segments, after them the one after the last, and how many of their blocks count.
        ``out``, K slots, passes them on.
    """
    FORCED: tl.constexpr = (INIT_BLOCKS + SEGMENT - 1) // SEGMENT
    segment = tl.arange(0, N // SEGMENT)
    end = last // SEGMENT
    taken = tl.maximum(room - INIT_BLOCKS, 0) + FORCED + 1
    taken = tl.minimum(tl.minimum(taken, end + 1), K)
    best = tl.load(bests_ptr + segment, mask=segment < (end + 4) // 4 * 4, other=-1.0)
    chosen = best_blocks(best, segment, end, end + 1, taken, FORCED, True)
    write_blocks(out_ptr, chosen, tl.arange(0, N // SEGMENT // 4) * 4)
    tl.debug_barrier()
    slot = tl.arange(0, TAKEN)
    segment = tl.load(out_ptr + slot, mask=slot < taken, other=end + 1)
    tl.debug_barrier()
    # Where the slots hold but the first segments, the last is none of those taken.
    after_last = tl.where(taken > tl.minimum(FORCED, end), SEGMENT - 1 - last % SEGMENT, 0)
    return segment, taken * SEGMENT - after_last


@triton.jit(do_not_specialize=_VARYING)
def pick_kernel(
    scores_ptr,
    bests_ptr,
    out_ptr,
    documents_ptr,
    first_head,
    first_row,
    end_row,
    offset,
    columns,
    Sq,
    K,
    Hkv,
    num_parts,
    first_part,
    BLOCK_SIZE: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    PART: tl.constexpr,
    PART_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAKEN: tl.constexpr,
    N: tl.constexpr,
):
    """Write one row's blocks, ascending: the forced ones, then the best scored, lowest at ties.

    Of a long row only ``TAKEN`` segments are read, by ``bests [num_heads, rows, columns //
    SEGMENT]``; 0: the whole row.
    """
    rows = end_row - first_row
    head = (tl.program_id(0) // rows).to(tl.int64)
    row = tl.program_id(0) % rows
    out_row = first_row + row
    own = (offset + out_row) // BLOCK_SIZE
    first_block = 0
    budget = K
    room = K
    if PART > 0:
        b = (first_head + head) // Hkv
        out_row, begin, end_row, budget = locate_tile(
            documents_ptr + b * num_parts * 3, out_row, first_part, offset, PART, PART_ROWS
        )
        own = tl.where(out_row < end_row, (offset + out_row - begin) // BLOCK_SIZE, -1)
        budget = tl.minimum(budget, K)
        first_block = begin // BLOCK_SIZE
        is_none = (first_row + row) % PART_ROWS >= PART  # it only fills a part's last tile
        room = tl.where(is_none, 0, K)
        own = tl.where(is_none, -1, own)
    out_ptr += ((first_head + head) * Sq + out_row) * K
    slot = tl.arange(0, BLOCK_K)
    if own < budget:  # every block fits
        tl.store(out_ptr + slot, tl.where(slot <= own, first_block + slot, -1), mask=slot < room)
        return

    scored = tl.maximum(own - LOCAL_BLOCKS, 0)  # those after them are forced, if the first fit, too
    room = tl.maximum(budget - LOCAL_BLOCKS - 1, tl.minimum(INIT_BLOCKS, budget))
    room = tl.minimum(room, scored)
    at = (head * rows + row) * (columns // 64) * 64  # rows start aligned, for wide loads
    if TAKEN > 0:
        bests_ptr += (head * rows + row) * (columns // 64) * (64 // SEGMENT)
        segment, count = _best_segments(
            bests_ptr, out_ptr, scored - 1, K, room, INIT_BLOCKS, TAKEN, N
        )
        block = segment[:, None] * SEGMENT
        mask = block < scored
        block += tl.arange(0, SEGMENT)[None, :]
        score = tl.load(scores_ptr + at + block, mask=mask, other=-1.0)
        block = tl.reshape(block, [TAKEN * SEGMENT])
        score = tl.reshape(score, [TAKEN * SEGMENT])
        fours = segment[:, None] * SEGMENT + tl.arange(0, SEGMENT // 4)[None, :] * 4
        fours = tl.reshape(fours, [TAKEN * SEGMENT // 4])
    else:
        block = tl.arange(0, N)
        fours = tl.arange(0, N // 4) * 4
        count = scored
        # Rows begin at multiples of 64 and have room for one: no load asks for a single block.
        mask = block < (scored + 15) // 16 * 16
        score = tl.load(scores_ptr + at + block, mask=mask, other=-1.0)
    chosen = best_blocks(score, block, scored - 1, count, room, INIT_BLOCKS, False)
    write_blocks(out_ptr, chosen, first_block + fours)
    local = tl.where(slot < budget, first_block + scored + slot - room, -1)
    tl.store(out_ptr + slot, local, mask=(slot >= room) & (slot < K))
