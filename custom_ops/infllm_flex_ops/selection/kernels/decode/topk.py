"""Select the best blocks of each query of a decode step, or list every block that it may see."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.selection.kernels.prefill.topk import topk_blocks, write_blocks
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.sizes import ceil_div, next_power_of_2
from infllm_flex_ops.triton_common.dependent_launch import wait_for_previous
from infllm_flex_ops.triton_common.pages import CachedRows, count_queries, is_missing, row_length

STEP = tl.constexpr(16)  # blocks for which rows of scores have room, a multiple


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
    BLOCK_SIZE: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    N: tl.constexpr,
    TAIL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Write one query's blocks, ascending: the best of those before the local ones, then these.

    ``scores``, of ``make_scores``, hold all blocks that can lie before the local ones; with a
    ``TAIL`` a block's score is the better one of two. Lists of ragged rows come token by token,
    with the heads of a token side by side.
    """
    token = tl.program_id(0)
    head = tl.program_id(1)
    b = head // Hkv
    length = row_length(start_ptr, end_ptr, b)
    num = count_queries(pages, b, n)
    position = length - num + token
    row = head.to(tl.int64) * n + token
    list_row = row
    if pages is not None:
        flat = tl.load(pages.query_start + b).to(tl.int64) + token
        list_row = flat * Hkv + head % Hkv
    wait_for_previous(OVERLAP)
    if is_missing(pages, token, num):
        return
    out_ptr += list_row * width
    slot = tl.arange(0, BLOCK_W)
    own = tl.where(position < 0, -1, position // BLOCK_SIZE)
    if (own < K) | (position + 1 < dense_len):  # every block
        tl.store(out_ptr + slot, tl.where(slot <= own, slot, -1), mask=slot < width)
        return
    free = K - LOCAL_BLOCKS - 1
    local = tl.where(slot < K, own - LOCAL_BLOCKS + slot - free, -1)
    tl.store(out_ptr + slot, local, mask=(slot >= free) & (slot < width))
    last = own - LOCAL_BLOCKS - 1
    block = tl.arange(0, N)
    # Rows begin at multiples of STEP and have room for one: a load takes four blocks.
    steps = columns // STEP
    scored = block < tl.minimum(last // STEP + 1, steps) * STEP
    scores_ptr += row * (steps * (2 if TAIL else 1)) * STEP
    score = tl.load(scores_ptr + block, mask=scored, other=-1.0)
    if TAIL:
        tail = tl.load(scores_ptr + steps * STEP + block, mask=scored, other=-1.0)
        score = tl.where(block > 0, tl.maximum(score, tail), score)
    selected = topk_blocks(score, block, last, last + 1, free, INIT_BLOCKS, False, True)
    write_blocks(out_ptr, selected, tl.arange(0, N // 4) * 4)


def make_scores(rows: CachedRows, heads: int, columns: int, has_tail: bool) -> Tensor:
    """Make room for scores ``[heads, n, 1 or 2, columns]``, or a few more columns.

    With a tail, a second row holds scores by windows that begin in the block before.
    """
    columns = STEP.value * max(1, ceil_div(columns, STEP.value))
    shape = (heads, rows.n, 2 if has_tail else 1, columns)
    return torch.empty(shape, dtype=torch.float32, device=rows.end.device)


def select_cached(
    scores: Tensor,
    rows: CachedRows,
    out: Tensor,
    rule: SelectionRule,
    dense_len: int,
    overlap: dict[str, Any],
) -> None:
    """Fill ``out [B, Hkv, n, width]``, or ``[T, Hkv, width]``, by ``scores``.

    ``overlap`` says whether the kernel may start while the one that scores ends.
    """
    width, columns = out.shape[-1], scores.shape[-1]
    N = next_power_of_2(columns)
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
        BLOCK_SIZE=rule.block_size,
        INIT_BLOCKS=rule.init_blocks,
        LOCAL_BLOCKS=rule.local_blocks,
        BLOCK_W=next_power_of_2(width),
        N=N,
        TAIL=scores.shape[2] == 2,
        **overlap,
        num_warps=_num_warps(N),
    )


def _num_warps(blocks: int) -> int:
    """Few threads wait less for each other; from 2048 blocks on, counting takes longer."""
    return max(1, min(4, blocks // 128), min(16, blocks // 512))
