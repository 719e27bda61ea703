"""Triton kernel of ``tile_blocks``: each tile merges the ascending lists of its tokens."""

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
from infllm_flex_ops.block_lists.membership import check_tile_tokens, count_words, word_dtype


class _Output(NamedTuple):
    """Lists by tile: partial blocks with their membership words, and full blocks."""

    num: Any
    idx: Any
    words: Any
    full_num: Any
    full_idx: Any


@triton.jit(do_not_specialize=["Sq", "K", "q_offset", "num_tiles", "total_tiles", "width"])
def _tile_blocks_kernel(
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
    SEPARATE_FULL: tl.constexpr,
):
    """Merge for a few tiles side by side, one lane per token: each step lists the lowest block."""
    lists = locate_lists(selected, Sq, K, q_offset, num_tiles, total_tiles, Hkv, TILING)
    flat, real = lists.flat, lists.real
    WORD: tl.constexpr = tl.int32 if TILING.TILE_TOKENS <= 32 else tl.int64
    WORDS: tl.constexpr = (TILING.TILE_TOKENS + 63) // 64  # of 64 tokens each
    lane = tl.arange(0, TILING.LANES)[None, :]
    bit = tl.where(real, tl.full([1, TILING.LANES], 1, WORD) << (lane % 64).to(WORD), 0)
    everyone = tl.sum(bit, 1)
    taken = tl.full([TILING.TILES, TILING.LANES], 0, tl.int32)
    block = next_block(lists, taken, real)
    num = tl.full([TILING.TILES], 0, tl.int32)
    full_num = tl.full([TILING.TILES], 0, tl.int32)
    lowest = tl.min(block, 1)
    while tl.min(lowest, 0) < LIST_END:
        hit = (block == lowest[:, None]) & (block < LIST_END)
        word = tl.sum(tl.where(hit if WORDS == 1 else hit & (lane < 64), bit, 0), 1)
        is_listed = lowest < LIST_END
        if SEPARATE_FULL:
            full = (lowest < lists.num_past) & (word == everyone)
            is_listed = is_listed & (full == 0)
        slot = flat * width + num
        tl.store(out.idx + slot, lowest, mask=is_listed & (num < width))
        words_slot = flat * (WORDS * width) + num
        tl.store(out.words + words_slot, word, mask=is_listed & (num < width))
        if WORDS > 1:
            second = tl.sum(tl.where(hit & (lane >= 64), bit, 0), 1)
            tl.store(out.words + words_slot + width, second, mask=is_listed & (num < width))
        num += is_listed.to(tl.int32)
        if SEPARATE_FULL:
            full_slot = flat * width + full_num
            tl.store(out.full_idx + full_slot, lowest, mask=full & (full_num < width))
            full_num += full.to(tl.int32)

        taken += hit.to(tl.int32)
        block = pass_lowest(lists, taken, block, hit)
        lowest = tl.min(block, 1)
    tl.store(out.num + flat, tl.minimum(num, width), mask=flat < total_tiles)
    tl.store(out.full_num + flat, tl.minimum(full_num, width), mask=flat < total_tiles)


def launch(
    selected: Tensor,
    kv_len: int,
    block_size: int,
    tile_tokens: int,
    width: int,
    separate_full: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate zeroed lists and merge into them, one warp for as many tiles as its lanes hold."""
    if separate_full:
        check_tile_tokens(tile_tokens)
    B, Hkv, Sq, _ = selected.shape
    num_tiles = triton.cdiv(Sq, tile_tokens)

    def zeros(*slots: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(B, Hkv, num_tiles, *slots, dtype=dtype, device=selected.device)

    out = _Output(
        num=zeros(),
        idx=zeros(width),
        words=zeros(width * count_words(tile_tokens), dtype=word_dtype(tile_tokens)),
        full_num=zeros(),
        full_idx=zeros(width if separate_full else 0),
    )
    if selected.numel():
        programs, arguments = merge_arguments(selected, kv_len, block_size, tile_tokens)
        _tile_blocks_kernel[(programs,)](
            out=out,
            width=width,
            SEPARATE_FULL=separate_full,
            num_warps=1,
            **arguments,
        )
    return tuple(out)
