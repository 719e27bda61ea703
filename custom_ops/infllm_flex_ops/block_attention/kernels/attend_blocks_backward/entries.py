"""Sort the lists of all tiles by block, compactly: which tiles attend to a block, and by whom.

Beside ``transpose_blocks`` this keeps the membership words and takes memory by listed pairs, not
by pairs that could be: a table of all would outgrow the sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.block_lists.kernels.transpose_blocks import mark_kernel

_CHUNK = 256


@triton.jit
def _count_bits(word):
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 63).to(tl.int32)


@triton.jit(do_not_specialize=["row_words"])
def _rank_kernel(bitmap_ptr, before_ptr, count_ptr, row_words, CHUNK: tl.constexpr):
    """Count, for one block, the marks before each word of its row."""
    row = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, row_words, CHUNK):
        at = start + tl.arange(0, CHUNK)
        word = tl.load(bitmap_ptr + row * row_words + at, mask=at < row_words, other=0)
        marks = _count_bits(word)
        before = count + tl.cumsum(marks, 0) - marks
        tl.store(before_ptr + row * row_words + at, before, mask=at < row_words)
        count += tl.sum(marks, 0)
    tl.store(count_ptr + row, count)


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "row_words"])
def _place_kernel(
    num_ptr,
    idx_ptr,
    words_ptr,
    bitmap_ptr,
    before_ptr,
    begin_ptr,
    tile_of_ptr,
    word_of_ptr,
    num_tiles,
    num_blocks,
    row_words,
    width,
    CHUNK: tl.constexpr,
):
    """Write one tile's number and words where its blocks keep theirs."""
    flat = tl.program_id(0).to(tl.int64)
    head = flat // num_tiles
    tile = (flat % num_tiles).to(tl.int32)
    num = tl.load(num_ptr + flat)
    for start in range(0, num, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        listed = slot < num
        block = tl.load(idx_ptr + flat * width + slot, mask=listed, other=0)
        row = head * num_blocks + block
        at = row * row_words + tile // 32
        earlier = tl.load(bitmap_ptr + at, mask=listed, other=0) & ((1 << (tile % 32)) - 1)
        place = tl.load(begin_ptr + row, mask=listed, other=0) + _count_bits(earlier)
        place += tl.load(before_ptr + at, mask=listed, other=0)
        tl.store(tile_of_ptr + place, tile, mask=listed)
        word = tl.load(words_ptr + flat * width + slot, mask=listed, other=0)
        tl.store(word_of_ptr + place, word, mask=listed)


def entries_by_block(
    num: Tensor, idx: Tensor, words: Tensor, blocks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """List (tile, word) of every listed pair, by head, block and tile; all arguments contiguous.

    Returns:
        ``begin`` int64 and ``count`` int32, ``[B * Hkv, blocks]``: a block's stretch of
        ``tile_of``, int32, and ``word_of``.
    """
    B, Hkv, num_tiles, width = idx.shape
    row_words = triton.cdiv(num_tiles, 32)
    rows, device = B * Hkv * blocks, idx.device
    bitmap = torch.zeros(rows, row_words, dtype=torch.int32, device=device)
    before = torch.empty(rows, row_words, dtype=torch.int32, device=device)
    count = torch.empty(rows, dtype=torch.int32, device=device)
    tile_of, word_of = (
        torch.empty(idx.numel(), dtype=x.dtype, device=device) for x in (idx, words)
    )
    tiles = (B * Hkv * num_tiles,)
    mark_kernel[tiles](
        num,
        idx,
        bitmap,
        *num.stride(),
        *idx.stride(),
        num_tiles,
        blocks,
        row_words,
        Hkv,
        _CHUNK,
        num_warps=2,
    )
    _rank_kernel[(rows,)](bitmap, before, count, row_words, _CHUNK, num_warps=2)
    begin = count.cumsum(0, dtype=torch.int64) - count
    _place_kernel[tiles](
        num,
        idx,
        words,
        bitmap,
        before,
        begin,
        tile_of,
        word_of,
        num_tiles,
        blocks,
        row_words,
        width,
        _CHUNK,
        num_warps=2,
    )
    return begin.view(B * Hkv, blocks), count.view(B * Hkv, blocks), tile_of, word_of
