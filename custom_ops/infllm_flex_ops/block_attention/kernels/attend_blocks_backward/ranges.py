"""Which tiles a program for dk and dv takes, and how sums pass from one range of tiles to the next.

Ranges keep the rows that all blocks read at about the same time in L2. The programs of a block walk
them from the end of the sequence to its beginning. Each adds the sums of the program before it,
which it waits for.

Programs number themselves by a ticket, in the order in which they start. A program waits for
smaller tickets only, whose programs run already or have ended, whatever order the hardware starts
them in. The smallest ticket of those that run waits for nobody, so none waits forever.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Ranges(NamedTuple):
    """Into which ranges the tiles of a head are divided.

    Attributes:
        first_tiles: Tiles of the first range, which all heads walk before any other; or none.
        tiles: Tiles of every other range, a multiple of 32.
        others: Other ranges.
        first_blocks: Blocks that the first range sees.
        heads_at_once: Heads whose blocks walk the first range side by side.
        sum_heads: Heads that have slots for the sums of the other ranges at a time.
    """

    first_tiles: Any
    tiles: Any
    others: Any
    first_blocks: Any
    heads_at_once: Any
    sum_heads: Any


class Problem(NamedTuple):
    """Sizes of the problem, in a kernel: KV heads of all batch rows, and a head's parts."""

    heads: Any
    num_tiles: Any
    num_blocks: Any
    max_splits: Any
    split_size: Any


class Task(NamedTuple):
    """The work of a program, in a kernel.

    Attributes:
        head: KV head, counted over all batch rows.
        chunk: Part of a block's keys.
        split: The split, if it takes one.
        block: The block, if it takes a range of tiles.
        number: The range, 0 for the first; -1 for a split.
        begin_tile: First tile of the range.
        end_tile: One past its last tile.
    """

    head: Any
    chunk: Any
    split: Any
    block: Any
    number: Any
    begin_tile: Any
    end_tile: Any


@triton.jit
def take_task(flags_ptr, ranges, problem, CHUNKS: tl.constexpr, IN_RANGES: tl.constexpr):
    """Take the next task: the splits, the first range of all heads, the other ranges by head.

    The last of the other ranges comes first. None waits for one that is taken later.
    """
    heads, num_tiles, num_blocks, max_splits, _ = problem
    program = tl.program_id(0)
    if IN_RANGES:
        program = tl.atomic_add(flags_ptr, 1, sem="relaxed")
    chunk = program % CHUNKS
    task = program // CHUNKS
    is_split = task < heads * max_splits
    head = task % heads
    split = head * max_splits + tl.minimum(task // heads, max_splits - 1)
    task -= heads * max_splits
    # A few heads at a time, whose rows stay in L2.
    seen = tl.maximum(ranges.first_blocks, 1)
    first_head = task // (ranges.heads_at_once * seen) * ranges.heads_at_once
    of_these = task - first_head * seen
    at_once = tl.maximum(tl.minimum(ranges.heads_at_once, heads - first_head), 1)
    if is_split == 0:
        head = first_head + of_these % at_once
    block = seen - 1 - of_these // at_once
    number = 0
    begin_tile, end_tile = 0, tl.minimum(ranges.first_tiles, num_tiles)
    if task >= heads * ranges.first_blocks:
        task -= heads * ranges.first_blocks
        head = task // (ranges.others * num_blocks)
        number = ranges.others - task // num_blocks % ranges.others
        block = num_blocks - 1 - task % num_blocks
        begin_tile = ranges.first_tiles + (number - 1) * ranges.tiles
        end_tile = tl.minimum(begin_tile + ranges.tiles, num_tiles)
    if is_split:
        number = -1
        end_tile = num_tiles
    return Task(head, chunk, split, block, number, begin_tile, end_tile)


@triton.jit
def find_pairs(task, tiles, splits, problem):
    """Find the block of a task and the tiles, of those that listed it, that the task walks.

    Returns:
        The block, the first of its tiles, how many of them come before, how many the task walks,
        and whether the task exists.
    """
    num_tiles, num_blocks = problem.num_tiles, problem.num_blocks
    block = task.block
    if task.number < 0:
        block = tl.load(splits.block + task.split)
    exists = (block < num_blocks) & (block >= 0)
    row = task.head.to(tl.int64) * num_blocks + tl.where(exists, block, 0)
    end = tl.load(tiles.length + row)
    skipped = 0
    if task.number < 0:
        skipped = tl.load(splits.number + task.split) * problem.split_size
        end = tl.minimum(end, skipped + problem.split_size)
    else:
        before = tiles.before + row * tl.cdiv(num_tiles, 32)
        skipped = tl.load(before + task.begin_tile // 32)
        if task.end_tile < num_tiles:
            end = tl.load(before + task.end_tile // 32)
        exists = exists & (tl.load(splits.per_block + row) == 0)
    return block, tl.load(tiles.begin + row) + skipped, skipped, end - skipped, exists


@triton.jit
def _locate_sums(sums_ptr, slot, inner, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """Find the gradients of a block's keys ``inner`` in a slot: of keys, of values, and a mask."""
    d = tl.arange(0, TILE.BLOCK_D)
    at = (slot.to(tl.int64) * 2 * SHAPE.BLOCK_SIZE + inner)[:, None] * SHAPE.D + d[None, :]
    mask = (inner < SHAPE.BLOCK_SIZE)[:, None] & (d < SHAPE.D)[None, :]
    return sums_ptr + at, sums_ptr + at + SHAPE.BLOCK_SIZE * SHAPE.D, mask


@triton.jit
def store_sums(sums_ptr, slot, inner, dk, dv, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """Write the gradients of a block's keys ``inner`` to a slot."""
    dk_ptr, dv_ptr, mask = _locate_sums(sums_ptr, slot, inner, SHAPE, TILE)
    tl.store(dk_ptr, dk, mask=mask)
    tl.store(dv_ptr, dv, mask=mask)


@triton.jit
def _wait(flag_ptr, number):
    """Wait until a flag has reached ``number``; then all is seen that was written before it."""
    reached = tl.atomic_add(flag_ptr, 0, sem="acquire")
    while reached < number:
        reached = tl.atomic_add(flag_ptr, 0, sem="acquire")


@triton.jit
def _add_sums(dk, dv, sums_ptr, slot, inner, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """Add the gradients of keys ``inner`` that another program wrote to a slot."""
    dk_ptr, dv_ptr, mask = _locate_sums(sums_ptr, slot, inner, SHAPE, TILE)
    dk += tl.load(dk_ptr, mask=mask, other=0.0, cache_modifier=".cg")  # not from L1
    dv += tl.load(dv_ptr, mask=mask, other=0.0, cache_modifier=".cg")
    return dk, dv


@triton.jit
def _signal(flag_ptr):
    """Add one to a flag, after all that the program's threads have read and written."""
    tl.debug_barrier()
    tl.atomic_add(flag_ptr, 1, sem="release")


@triton.jit
def pass_on(
    dk,
    dv,
    grads,
    task,
    block,
    own_tile,
    inner,
    ranges,
    problem,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add the sums of ranges before, and pass all on unless the range is a block's last.

    Args:
        dk: Gradients of keys ``inner`` from the task's range.
        dv: Gradients of their values.
        grads: Where sums pass.
        task: The task.
        block: Its block.
        own_tile: First tile that may have listed the block.
        inner: Keys within the block.
        ranges: The ranges.
        problem: Sizes of the problem.
        SHAPE: Compile-time sizes of the problem.
        TILE: Compile-time sizes of a program.

    Returns:
        The sums, and whether they are complete.
    """
    num_blocks = problem.num_blocks
    finished = grads.flags + 1 + task.head
    in_first = finished - task.head + problem.heads
    in_first += task.head * num_blocks + block
    in_sums = in_first + num_blocks * problem.heads
    first_slot = task.head * ranges.first_blocks + block
    slot = task.head % ranges.sum_heads * num_blocks + block
    passed = ranges.others - task.number
    # Computed again, as registers are few: whether no earlier range lists the block.
    is_last = own_tile >= ranges.first_tiles + (task.number - 1) * ranges.tiles
    if task.number == 0:
        is_last = ranges.others == 0
        if is_last == 0:
            store_sums(grads.first, first_slot, inner, dk, dv, SHAPE, TILE)
            _signal(in_first)
    else:
        if passed > 0:
            _wait(in_sums, passed)
            dk, dv = _add_sums(dk, dv, grads.sums, slot, inner, SHAPE, TILE)
        if (task.number == 1) & (is_last == 0):
            _wait(in_first, 1)
            dk, dv = _add_sums(dk, dv, grads.first, first_slot, inner, SHAPE, TILE)
            is_last = own_tile >= 0
        if is_last == 0:
            if (passed == 0) & (task.head >= ranges.sum_heads):
                # The head that had the slots before must be done with them.
                _wait(finished - ranges.sum_heads, num_blocks)
            store_sums(grads.sums, slot, inner, dk, dv, SHAPE, TILE)
            _signal(in_sums)
    return dk, dv, is_last


@triton.jit
def finish(flags_ptr, task, own_tile, ranges, problem):
    """Count the blocks of a head whose slots are free, if another head waits for them.

    The last program that walks a block counts it, whether or not the block is split.
    """
    begin_tile = ranges.first_tiles + (task.number - 1) * ranges.tiles
    walks = (own_tile < begin_tile + ranges.tiles) | (task.number == ranges.others)
    is_last = walks & ((own_tile >= begin_tile) | (task.number == 1))
    if (task.number > 0) & is_last & (problem.heads > ranges.sum_heads):
        _signal(flags_ptr + 1 + task.head)
