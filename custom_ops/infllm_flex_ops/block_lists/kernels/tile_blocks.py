"""Triton kernel of ``tile_blocks``: each tile merges the ascending lists of its tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.block_lists.membership import word_dtype

LIST_END = tl.constexpr(0x7FFFFFFF)  # what follows a list's last block


@triton.jit
def locate_lists(
    selected_ptr,
    stride_b,
    stride_h,
    stride_s,
    Sq,
    offset,
    num_tiles,
    total_tiles,
    Hkv,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
):
    """Find the lists of a program's tiles, one lane a token.

    Returns:
        ``[TILES]``: each tile's number among all heads', and its head; ``[TILES, LANES]``: the
        query of each lane, whether there is one, and its own block; ``[TILES]``: how many blocks
        end by the first token; ``[TILES, LANES]``: where each list begins.
    """
    flat = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    head = flat // num_tiles
    tile = (flat % num_tiles).to(tl.int32)
    lane = tl.arange(0, LANES)
    row = tile[:, None] * TILE_TOKENS + lane[None, :]
    real = (flat < total_tiles)[:, None] & (lane < TILE_TOKENS)[None, :] & (row < Sq)
    own = (offset + row) // BLOCK_SIZE
    num_past = (offset + tile * TILE_TOKENS + 1) // BLOCK_SIZE
    list_ptr = selected_ptr + (head // Hkv * stride_b + head % Hkv * stride_h)[:, None]
    list_ptr += row.to(tl.int64) * stride_s
    return flat, head, row, real, own, num_past, list_ptr


@triton.jit
def next_block(list_ptr, taken, own, stride_k, K, mask):
    """Read the blocks at slots ``taken``; ``LIST_END`` after a list's last and where not asked.

    Blocks that begin after their token, whose own block is ``own``, end its list.
    """
    at = list_ptr + taken.to(tl.int64) * stride_k
    block = tl.load(at, mask=mask & (taken < K), other=-1)
    return tl.where((block < 0) | (block > own), LIST_END, block)


@triton.jit(do_not_specialize=["Sq", "K", "offset", "num_tiles", "total_tiles", "width"])
def _tile_blocks_kernel(
    selected_ptr,
    kv_num_ptr,
    kv_idx_ptr,
    words_ptr,
    full_num_ptr,
    full_idx_ptr,
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
    SEPARATE_FULL: tl.constexpr,
):
    """Merge for a few tiles side by side, one lane a token: each step lists the lowest block."""
    flat, _, _, real, own, num_past, list_ptr = locate_lists(
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
    WORD: tl.constexpr = tl.int32 if TILE_TOKENS <= 32 else tl.int64
    lane = tl.arange(0, LANES)[None, :]
    bit = tl.where(real, tl.full([1, LANES], 1, WORD) << lane.to(WORD), 0)
    everyone = tl.sum(bit, 1)
    taken = tl.zeros([TILES, LANES], tl.int32)
    block = next_block(list_ptr, taken, own, stride_k, K, real)
    kv_num = tl.zeros([TILES], tl.int32)
    full_num = tl.zeros([TILES], tl.int32)
    lowest = tl.min(block, 1)
    while tl.min(lowest, 0) < LIST_END:
        hit = (block == lowest[:, None]) & (block < LIST_END)
        word = tl.sum(tl.where(hit, bit, 0), 1)
        part = lowest < LIST_END
        if SEPARATE_FULL:
            full = (lowest < num_past) & (word == everyone)
            part = part & (full == 0)
        part_slot = flat * width + kv_num
        tl.store(kv_idx_ptr + part_slot, lowest, mask=part & (kv_num < width))
        tl.store(words_ptr + part_slot, word, mask=part & (kv_num < width))
        kv_num += part.to(tl.int32)
        if SEPARATE_FULL:
            full_slot = flat * width + full_num
            tl.store(full_idx_ptr + full_slot, lowest, mask=full & (full_num < width))
            full_num += full.to(tl.int32)

        taken += hit.to(tl.int32)
        following = next_block(list_ptr, taken, own, stride_k, K, hit)
        block = tl.where(hit, following, block)
        lowest = tl.min(block, 1)
    tl.store(kv_num_ptr + flat, tl.minimum(kv_num, width), mask=flat < total_tiles)
    tl.store(full_num_ptr + flat, tl.minimum(full_num, width), mask=flat < total_tiles)


def launch(
    selected: Tensor,
    kv_len: int,
    block_size: int,
    tile_tokens: int,
    width: int,
    separate_full: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate zeroed lists and merge into them, a warp for as many tiles as its lanes hold."""
    B, Hkv, Sq, K = selected.shape
    num_tiles = triton.cdiv(Sq, tile_tokens)
    total_tiles = B * Hkv * num_tiles
    kv_num, full_num = (
        torch.zeros(B, Hkv, num_tiles, dtype=torch.int32, device=selected.device) for _ in range(2)
    )
    kv_idx, words, full_idx = (
        torch.zeros(B, Hkv, num_tiles, slots, dtype=dtype, device=selected.device)
        for slots, dtype in (
            (width, torch.int32),
            (width, word_dtype(tile_tokens)),
            (width if separate_full else 0, torch.int32),
        )
    )
    lanes = triton.next_power_of_2(tile_tokens)
    tiles = max(1, 32 // lanes)
    if selected.numel():
        _tile_blocks_kernel[(triton.cdiv(total_tiles, tiles),)](
            selected,
            kv_num,
            kv_idx,
            words,
            full_num,
            full_idx,
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
            separate_full,
            num_warps=1,
        )
    return kv_num, kv_idx, words, full_num, full_idx
