"""Pick the best blocks of a row: the threshold of its K-th score, found by counting, no sort."""

import triton
import triton.language as tl

from custom_ops.kernels.select_blocks.documents import locate_tile

_VARYING = ["first_head", "first_row", "end_row", "offset", "Sq", "K", "num_parts", "first_part"]


@triton.jit
def _log_of_count(count):
    """About the logarithm, up to a factor and a summand, for interpolation: the float's own bits.

    None counts as a half.
    """
    return tl.maximum(count.to(tl.float32), 0.5).to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def best_blocks(score, block, own, K, INIT_BLOCKS: tl.constexpr, LOCAL_BLOCKS: tl.constexpr):
    """Mark the K best of more than K blocks: forced ones, then by score, the lowest at ties.

    Args:
        score: ``[N]``, below 0 where there is none.
        block: ``[N]``, the numbers from 0 on.
        own: The query's own block, at least K.
        K: Budget.
        INIT_BLOCKS: First blocks, forced.
        LOCAL_BLOCKS: Blocks before the own one that are forced, as it is.
    """
    N: tl.constexpr = score.shape[0]
    # Non-negative floats order as their bits do: unscored 0, scores from 1 up, forced above all.
    key = tl.maximum(score.to(tl.int32, bitcast=True), -1) + 1
    key = tl.where((block < INIT_BLOCKS) | (block >= own - LOCAL_BLOCKS), 0x7FFFFFFF, key)
    key = tl.where(block <= own, key, -1)

    # The largest threshold that at least K keys reach, or any that exactly K reach: at least K
    # reach `low`, fewer reach `high`, and the gap closes where the counts suggest.
    # Comparisons and selections take twice as many of the scarcest instructions as these sums and
    # signs: as unsigned numbers -1 is the largest, and after the forced ones come negative ones.
    bits = key.to(tl.uint32, bitcast=True)
    low = tl.min(bits, 0).to(tl.int32, bitcast=True)
    high = tl.max((bits + 1).to(tl.int32, bitcast=True), 0)
    num_low = own + 1
    num_high = tl.minimum(INIT_BLOCKS + LOCAL_BLOCKS + 1, num_low)  # the forced ones
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
        count = N + tl.sum((key - trial) >> 31, 0)
        log_count = _log_of_count(count)
        reached = count >= K
        low = tl.where(reached, trial, low)
        num_low = tl.where(reached, count, num_low)
        high = tl.where(reached, tl.where(is_close, trial + 1, high), trial)
        num_high = tl.where(reached, num_high, count)
        log_low = tl.where(reached, log_count, log_low)
        log_high = tl.where(reached, log_high, log_count)
        step += 1
    if num_low > K:  # ties at the threshold: the lowest blocks
        room = K - tl.sum((key > low).to(tl.int32), 0)
        tied = key == low
        key = tl.where(tied & (tl.cumsum(tied.to(tl.int32), 0) > room), -1, key)
    return key >= low


@triton.jit
def write_blocks(out_ptr, chosen, first_block, N: tl.constexpr):
    """Write the numbers of the chosen blocks, ``[N]``, from ``first_block`` on, ascending."""
    # Places are counted over fours and then within them: fewer sums pass from lane to lane.
    inner = tl.arange(0, 4)[None, :]
    bits = tl.reshape(chosen.to(tl.int32), [N // 4, 4])
    count = tl.sum(bits, 1)
    word = tl.sum(bits << inner, 1)[:, None]
    below = word & ((1 << inner) - 1)
    place = (tl.cumsum(count, 0) - count)[:, None]
    place += (below & 1) + ((below >> 1) & 1) + (below >> 2)
    block = first_block + tl.arange(0, N // 4)[:, None] * 4 + inner
    tl.store(out_ptr + place, block, mask=((word >> inner) & 1) != 0)


@triton.jit(do_not_specialize=_VARYING)
def pick_kernel(
    scores_ptr,
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
    N: tl.constexpr,
):
    """Write one row's blocks, ascending: the forced ones, then the best scored, lowest at ties."""
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

    block = tl.arange(0, N)
    # Rows begin at multiples of 16 and have room for one: no load asks for a single block.
    num_scored = own - LOCAL_BLOCKS
    at = (head * rows + row) * columns + block
    score = tl.load(scores_ptr + at, mask=block < (num_scored + 15) // 16 * 16, other=-1.0)
    score = tl.where(block < num_scored, score, -1.0)
    chosen = best_blocks(score, block, own, budget, INIT_BLOCKS, LOCAL_BLOCKS)
    write_blocks(out_ptr, chosen, first_block, N)
    if PART > 0:
        tl.store(out_ptr + slot, -1, mask=(slot >= budget) & (slot < K))
