"""Triton kernel of ``split_shared_blocks``: each tile merges the ascending lists of its tokens."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.block_lists.kernels.merge import (
    LIST_END,
    locate_lists,
    merge_arguments,
    next_block,
    pass_lowest,
)


class _Output(NamedTuple):
    """Counts and shared blocks by tile, and what remains by token."""

    num: Any
    idx: Any
    rest: Any


@triton.jit(do_not_specialize=["Sq", "K", "q_offset", "num_tiles", "total_tiles", "width"])
def _split_shared_blocks_kernel(
    selected,
    out,
    Sq,
    K,
    q_offset,
    num_tiles,
    total_tiles,
    width,
    Hkv,
    TILING: tl.constexpr,
):
    """Merge for a few tiles side by side, one lane per token: each step places the lowest block."""
    lists = locate_lists(selected, Sq, K, q_offset, num_tiles, total_tiles, Hkv, TILING)
    flat, real = lists.flat, lists.real
    everyone = tl.sum(real.to(tl.int32), 1)
    rest_ptr = out.rest + (lists.head[:, None] * Sq + lists.row) * K
    taken = tl.full([TILING.TILES, TILING.LANES], 0, tl.int32)
    num_rest = tl.full([TILING.TILES, TILING.LANES], 0, tl.int32)
    num = tl.full([TILING.TILES], 0, tl.int32)
    block = next_block(lists, taken, real)
    lowest = tl.min(block, 1)
    while tl.min(lowest, 0) < LIST_END:
        hit = (block == lowest[:, None]) & (block < LIST_END)
        shared = (lowest < lists.num_past) & (tl.sum(hit.to(tl.int32), 1) == everyone)
        tl.store(out.idx + flat * width + num, lowest, mask=shared & (num < width))
        num += shared.to(tl.int32)
        remains = hit & (shared == 0)[:, None]
        tl.store(rest_ptr + num_rest, block, mask=remains)
        num_rest += remains.to(tl.int32)

        taken += hit.to(tl.int32)
        block = pass_lowest(lists, taken, block, hit)
        lowest = tl.min(block, 1)
    tl.store(out.num + flat, tl.minimum(num, width), mask=flat < total_tiles)


def launch(
    selected: Tensor, kv_len: int, block_size: int, tile_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate empty lists and merge into them, one warp for as many tiles as its lanes hold."""
    B, Hkv, Sq, K = selected.shape
    num_tiles = triton.cdiv(Sq, tile_tokens)
    width = min(K, triton.cdiv(kv_len, block_size))
    num, idx = (
        torch.zeros(B, Hkv, num_tiles, *slots, dtype=torch.int32, device=selected.device)
        for slots in ((), (width,))
    )
    rest = torch.full((B, Hkv, Sq, K), -1, dtype=torch.int32, device=selected.device)
    if selected.numel():
        programs, arguments = merge_arguments(selected, kv_len, block_size, tile_tokens)
        _split_shared_blocks_kernel[(programs,)](
            out=_Output(num, idx, rest),
            width=width,
            num_warps=1,
            **arguments,
        )
    return num, idx, rest
