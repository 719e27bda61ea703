"""Triton kernel of ``split_shared_blocks``: each tile merges the ascending lists of its tokens."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.block_lists.kernels.merge import (
    LIST_END,
    choose_tiling,
    locate_lists,
    next_block,
)
from infllm_flex_ops.triton_common.tensor_args import view


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
    flat, head, row, real, own, num_past, list_ptr = locate_lists(
        selected, Sq, q_offset, num_tiles, total_tiles, Hkv, TILING
    )
    everyone = tl.sum(real.to(tl.int32), 1)
    rest_ptr = out.rest + (head[:, None] * Sq + row) * K
    taken = tl.full([TILING.TILES, TILING.LANES], 0, tl.int32)
    num_rest = tl.full([TILING.TILES, TILING.LANES], 0, tl.int32)
    num = tl.full([TILING.TILES], 0, tl.int32)
    block = next_block(list_ptr, taken, own, selected.d, K, real)
    lowest = tl.min(block, 1)
    while tl.min(lowest, 0) < LIST_END:
        hit = (block == lowest[:, None]) & (block < LIST_END)
        shared = (lowest < num_past) & (tl.sum(hit.to(tl.int32), 1) == everyone)
        tl.store(out.idx + flat * width + num, lowest, mask=shared & (num < width))
        num += shared.to(tl.int32)
        remains = hit & (shared == 0)[:, None]
        tl.store(rest_ptr + num_rest, block, mask=remains)
        num_rest += remains.to(tl.int32)

        taken += hit.to(tl.int32)
        following = next_block(list_ptr, taken, own, selected.d, K, hit)
        block = tl.where(hit, following, block)
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
        total_tiles = B * Hkv * num_tiles
        tiling = choose_tiling(block_size, tile_tokens)
        _split_shared_blocks_kernel[(triton.cdiv(total_tiles, tiling.TILES),)](
            selected=view(selected),
            out=_Output(num, idx, rest),
            Sq=Sq,
            K=K,
            q_offset=kv_len - Sq,
            num_tiles=num_tiles,
            total_tiles=total_tiles,
            width=width,
            Hkv=Hkv,
            TILING=tiling,
            num_warps=1,
        )
    return num, idx, rest
