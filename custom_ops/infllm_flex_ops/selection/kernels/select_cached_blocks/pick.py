"""Pick the best blocks of each query of a decode step, or list all that it may see."""

import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.selection.kernels.select_blocks.pick import best_blocks, write_blocks


@triton.jit(do_not_specialize=["n", "columns", "width", "K", "dense_len"])
def cached_pick_kernel(
    scores_ptr,
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
):
    """Write one query's blocks, ascending: the best of those before the window, then the window.

    ``scores [B * Hkv, n, columns]`` holds all blocks that can lie before a window.
    """
    token = tl.program_id(0)
    head = tl.program_id(1)
    b = head // Hkv
    length = (tl.load(end_ptr + b) - tl.load(start_ptr + b)).to(tl.int32)
    position = length - n + token
    row = head.to(tl.int64) * n + token
    out_ptr += row * width
    slot = tl.arange(0, BLOCK_W)
    own = tl.where(position < 0, -1, position // BLOCK_SIZE)
    if (own < K) | (position + 1 < dense_len):  # every block
        tl.store(out_ptr + slot, tl.where(slot <= own, slot, -1), mask=slot < width)
        return
    room = K - LOCAL_BLOCKS - 1
    window = tl.where(slot < K, own - LOCAL_BLOCKS + slot - room, -1)
    tl.store(out_ptr + slot, window, mask=(slot >= room) & (slot < width))
    last = own - LOCAL_BLOCKS - 1
    block = tl.arange(0, N)
    scored = (block <= last) & (block < columns)
    score = tl.load(scores_ptr + row * columns + block, mask=scored, other=-1.0)
    chosen = best_blocks(score, block, last, last + 1, room, INIT_BLOCKS, False)
    write_blocks(out_ptr, chosen, tl.arange(0, N // 4) * 4)


def pick_cached(
    scores: Tensor,
    start: Tensor,
    end: Tensor,
    out: Tensor,
    *,
    columns: int,
    num_selected: int,
    dense_len: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
) -> Tensor:
    """Fill ``out [B, Hkv, n, width]`` by ``scores [B * Hkv, n, columns]``; returns it."""
    B, Hkv, n, width = out.shape
    N = max(16, triton.next_power_of_2(columns))
    cached_pick_kernel[(n, B * Hkv)](
        scores,
        start,
        end,
        out,
        n,
        columns,
        width,
        num_selected,
        dense_len,
        Hkv,
        BLOCK_SIZE=block_size,
        INIT_BLOCKS=init_blocks,
        LOCAL_BLOCKS=local_blocks,
        BLOCK_W=triton.next_power_of_2(width),
        N=N,
        num_warps=max(1, min(16, N // 512)),
    )
    return out
