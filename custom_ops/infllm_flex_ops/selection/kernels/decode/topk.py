"""Select the best blocks of each query of a decode step, or list every block that it may see."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.selection.kernels.prefill.topk import topk_blocks, write_blocks
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.sizes import ceil_div, next_power_of_2
from infllm_flex_ops.triton_common.pages import CachedRows, count_queries, is_missing, row_length

_MAX_DIRECT = 2048  # blocks that a program chooses among without choosing segments first


class ListSizes(NamedTuple):
    """Compile-time sizes of a query's list.

    Attributes:
        BLOCK_SIZE: Keys per block.
        INIT_BLOCKS: First blocks, always selected.
        LOCAL_BLOCKS: Blocks before the query's own that are always selected.
        WIDTH: Slots of the list, padded to a power of two.
        N: Blocks that can lie before the local ones, padded to a power of two.
        SEGMENT: Blocks of a segment, whose best score is known; 0 if all blocks are compared.
        TAKEN: Segments that can hold selected blocks, padded to a power of two.
    """

    BLOCK_SIZE: int
    INIT_BLOCKS: int
    LOCAL_BLOCKS: int
    WIDTH: int
    N: int
    SEGMENT: int
    TAKEN: int

    @classmethod
    def of(cls, rule: SelectionRule, width: int, columns: int) -> "ListSizes":
        """Sizes of lists of ``width`` slots, chosen among ``columns`` scores."""
        N = max(16, next_power_of_2(columns))
        return cls(*rule[4:7], next_power_of_2(width), N, 0, 0)

    def by_segments(self, rule: SelectionRule, segment: int) -> "ListSizes | None":
        """Sizes for the last program that scores, of a few warps; None if they are too large.

        Args:
            rule: Settings.
            segment: Blocks whose best score a program knows, a power of two.
        """
        if self.N <= _MAX_DIRECT:
            return self
        best = rule.num_selected - rule.local_blocks - 1 - rule.init_blocks
        taken = next_power_of_2(best + ceil_div(rule.init_blocks, segment))
        if segment < 4 or max(self.N // segment, taken * segment) > _MAX_DIRECT:
            return None
        return self._replace(SEGMENT=segment, TAKEN=taken)


@triton.jit
def list_every_block(out_ptr, position, width, SIZES: tl.constexpr):
    """Write all blocks up to a query's own, which fit the list; none for a query on padding."""
    slot = tl.arange(0, SIZES.WIDTH)
    own = tl.where(position < 0, -1, position // SIZES.BLOCK_SIZE)
    tl.store(out_ptr + slot, tl.where(slot <= own, slot, -1), mask=slot < width)


@triton.jit
def list_best_blocks(
    scores_ptr, best_ptr, out_ptr, position, columns, width, K, SIZES: tl.constexpr
):
    """Write a query's blocks, ascending: the best of those before the local ones, then these.

    Args:
        scores_ptr: The query's scores of all blocks that can lie before the local ones.
        best_ptr: The best score of each segment; unused without segments.
        out_ptr: Its list.
        position: Its position, with at least ``K`` blocks before its own.
        columns: Number of scores.
        width: Slots of the list.
        K: Budget.
        SIZES: Sizes of the list.
    """
    LOCAL_BLOCKS: tl.constexpr = SIZES.LOCAL_BLOCKS
    INIT_BLOCKS: tl.constexpr = SIZES.INIT_BLOCKS
    slot = tl.arange(0, SIZES.WIDTH)
    last = position // SIZES.BLOCK_SIZE - LOCAL_BLOCKS - 1
    free = K - LOCAL_BLOCKS - 1
    if SIZES.SEGMENT > 0:
        SEGMENT: tl.constexpr = SIZES.SEGMENT
        TAKEN: tl.constexpr = SIZES.TAKEN
        segment = _best_segments(best_ptr, out_ptr, last, free, SIZES)
        block = segment[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
        block = tl.reshape(block, [TAKEN * SEGMENT])
        fours = segment[:, None] * SEGMENT + tl.arange(0, SEGMENT // 4)[None, :] * 4
        fours = tl.reshape(fours, [TAKEN * SEGMENT // 4])
        count = tl.sum(tl.minimum(tl.maximum(last + 1 - segment * SEGMENT, 0), SEGMENT), 0)
    else:
        block = tl.arange(0, SIZES.N)
        fours = tl.arange(0, SIZES.N // 4) * 4
        count = last + 1
    scored = (block <= last) & (block < columns)
    # The scores may be those of other programs of this launch.
    score = tl.load(scores_ptr + block, mask=scored, other=-1.0, cache_modifier=".cg")
    selected = topk_blocks(score, block, last, count, free, INIT_BLOCKS, False)
    write_blocks(out_ptr, selected, fours)
    local = tl.where(slot < K, last + 1 + slot - free, -1)
    tl.store(out_ptr + slot, local, mask=(slot >= free) & (slot < width))


@triton.jit
def _best_segments(best_ptr, out_ptr, last, free, SIZES: tl.constexpr):
    """List the segments ``[TAKEN]`` that hold the ``free`` best blocks up to ``last``, ascending.

    A block in another segment is worse than the best block of each segment taken by score, and
    there are as many of these as blocks to take by score. The list is padded with the segment after
    the last. ``out`` passes it from thread to thread.
    """
    INIT_BLOCKS: tl.constexpr = SIZES.INIT_BLOCKS
    SEGMENT: tl.constexpr = SIZES.SEGMENT
    FORCED: tl.constexpr = (INIT_BLOCKS + SEGMENT - 1) // SEGMENT
    segment = tl.arange(0, SIZES.N // SEGMENT)
    end = last // SEGMENT
    taken = tl.minimum(free - INIT_BLOCKS + FORCED, end + 1)
    best = tl.load(best_ptr + segment, mask=segment <= end, other=-1.0, cache_modifier=".cg")
    selected = topk_blocks(best, segment, end, end + 1, taken, FORCED, False)
    write_blocks(out_ptr, selected, tl.arange(0, SIZES.N // SEGMENT // 4) * 4)
    tl.debug_barrier()
    slot = tl.arange(0, SIZES.TAKEN)
    listed = tl.load(out_ptr + slot, mask=slot < taken, other=end + 1)
    tl.debug_barrier()
    return listed


@triton.jit
def list_offset(pages, row, head, token, b, Hkv, width):
    """Offset of a query's list; ``row`` counts queries head by head.

    Lists of ragged rows come token by token, with the heads of a token side by side.
    """
    if pages is not None:
        flat = tl.load(pages.query_start + b).to(tl.int64) + token
        row = flat * Hkv + head % Hkv
    return row * width


@triton.jit(do_not_specialize=["n", "columns", "width", "K", "dense_len"])
def cached_topk_kernel(
    scores_ptr,
    pages,
    start_ptr,
    end_ptr,
    out_ptr,
    n,
    columns,
    width,
    K,
    dense_len,
    Hkv,
    SIZES: tl.constexpr,
):
    """Write one query's list by ``scores [B * Hkv, n, columns]``."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    b = head // Hkv
    length = row_length(start_ptr, end_ptr, b)
    num = count_queries(pages, b, n)
    if is_missing(pages, token, num):
        return
    row = head.to(tl.int64) * n + token
    out_ptr += list_offset(pages, row, head, token, b, Hkv, width)
    position = length - num + token
    if (position < K * SIZES.BLOCK_SIZE) | (position + 1 < dense_len):
        list_every_block(out_ptr, position, width, SIZES)
    else:
        scores_ptr += row * columns
        list_best_blocks(scores_ptr, None, out_ptr, position, columns, width, K, SIZES)


def select_cached(
    scores: Tensor,
    rows: CachedRows,
    out: Tensor,
    columns: int,
    rule: SelectionRule,
    dense_len: int,
) -> None:
    """Fill ``out [B, Hkv, n, width]``, or ``[T, Hkv, width]``, by ``scores``."""
    width = out.shape[-1]
    sizes = ListSizes.of(rule, width, columns)
    cached_topk_kernel[(rows.n, len(scores))](
        scores_ptr=scores,
        pages=rows.pages,
        start_ptr=rows.start,
        end_ptr=rows.end,
        out_ptr=out,
        n=rows.n,
        columns=columns,
        width=width,
        K=rule.num_selected,
        dense_len=dense_len,
        Hkv=len(scores) // rows.B,
        SIZES=sizes,
        num_warps=max(1, min(16, sizes.N // 512)),
    )
