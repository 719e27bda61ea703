"""Triton kernel of ``split_shared_blocks``: each tile merges the ascending lists of its tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.block_lists.kernels.tile_blocks import LIST_END, locate_lists, next_block


@triton.jit(do_not_specialize=["Sq", "K", "offset", "num_tiles", "total_tiles", "width"])
def _split_shared_blocks_kernel(
    selected_ptr,
    num_ptr,
    idx_ptr,
    rest_ptr,
    stride_b,
    stride_h,
    stride_s,
    stride_k,
    Sq,
    K,
    offset,
    num_tiles,
    total_tiles,
    width,
    Hkv,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
):
    """Merge for a few tiles side by side, one lane a token: each step deals out one block."""
    flat, head, row, real, own, num_past, list_ptr = locate_lists(
        selected_ptr,
        stride_b,
        stride_h,
        stride_s,
        Sq,
        offset,
        num_tiles,
        total_tiles,
        Hkv,
        BLOCK_SIZE,
        TILE_TOKENS,
        LANES,
        TILES,
    )
    everyone = tl.sum(real.to(tl.int32), 1)
    rest_ptr += (head[:, None] * Sq + row) * K
    taken = tl.zeros([TILES, LANES], tl.int32)
    left = tl.zeros([TILES, LANES], tl.int32)
    num = tl.zeros([TILES], tl.int32)
    block = next_block(list_ptr, taken, own, stride_k, K, real)
    lowest = tl.min(block, 1)
    while tl.min(lowest, 0) < LIST_END:
        hit = (block == lowest[:, None]) & (block < LIST_END)
        shared = (lowest < num_past) & (tl.sum(hit.to(tl.int32), 1) == everyone)
        tl.store(idx_ptr + flat * width + num, lowest, mask=shared & (num < width))
        num += shared.to(tl.int32)
        stays = hit & (shared == 0)[:, None]
        tl.store(rest_ptr + left, block, mask=stays)
        left += stays.to(tl.int32)

        taken += hit.to(tl.int32)
        following = next_block(list_ptr, taken, own, stride_k, K, hit)
        block = tl.where(hit, following, block)
        lowest = tl.min(block, 1)
    tl.store(num_ptr + flat, tl.minimum(num, width), mask=flat < total_tiles)


def launch(
    selected: Tensor, kv_len: int, block_size: int, tile_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate empty lists and deal blocks out to them, a warp for as many tiles as lanes hold."""
    B, Hkv, Sq, K = selected.shape
    num_tiles = triton.cdiv(Sq, tile_tokens)
    total_tiles = B * Hkv * num_tiles
    width = min(K, triton.cdiv(kv_len, block_size))
    num, idx = (
        torch.zeros(B, Hkv, num_tiles, *slots, dtype=torch.int32, device=selected.device)
        for slots in ((), (width,))
    )
    rest = torch.full((B, Hkv, Sq, K), -1, dtype=torch.int32, device=selected.device)
    lanes = triton.next_power_of_2(tile_tokens)
    tiles = max(1, 32 // lanes)
    if selected.numel():
        _split_shared_blocks_kernel[(triton.cdiv(total_tiles, tiles),)](
            selected,
            num,
            idx,
            rest,
            *selected.stride(),
            Sq,
            K,
            kv_len - Sq,
            num_tiles,
            total_tiles,
            width,
            Hkv,
            block_size,
            tile_tokens,
            lanes,
            tiles,
            num_warps=1,
        )
    return num, idx, rest
