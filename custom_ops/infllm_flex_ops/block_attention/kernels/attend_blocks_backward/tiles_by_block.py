"""List the tiles that listed each block, with the membership bits of their tokens.

Unlike ``transpose_blocks`` this keeps the bits, and takes memory for listed pairs only: a table of
all pairs would grow with the square of the sequence.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.block_lists.kernels.transpose_blocks import mark
from infllm_flex_ops.triton_common.tensor_args import Lists

_CHUNK = 256


class TilesByBlock(NamedTuple):
    """The (tile, block) pairs of all lists, sorted by head, block and tile.

    Attributes:
        begin: First pair of each block, int64 ``[B * Hkv, blocks]``.
        length: Pairs of each block, int32 ``[B * Hkv, blocks]``.
        tile: Tile of each pair, int32.
        membership: Membership bits of each pair; None for tiles of one token.
        before: Pairs of each block before every 32nd tile, int32 ``[B * Hkv * blocks, words]``.
    """

    begin: Tensor
    length: Tensor
    tile: Tensor
    membership: Tensor | None
    before: Tensor


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
    """Count, for one block, the marks before each word of its row of the bitmap."""
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
def _place_kernel(lists, tiles, bitmap_ptr, num_tiles, num_blocks, row_words, CHUNK: tl.constexpr):
    """Write one tile, and its membership bits, to the places of the blocks that it listed."""
    flat = tl.program_id(0).to(tl.int64)
    head = flat // num_tiles
    tile = (flat % num_tiles).to(tl.int32)
    num = tl.load(lists.num + flat)
    for start in range(0, num, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        listed = slot < num
        block = tl.load(lists.idx + flat * lists.width + slot, mask=listed, other=0)
        row = head * num_blocks + block
        at = row * row_words + tile // 32
        earlier = tl.load(bitmap_ptr + at, mask=listed, other=0) & ((1 << (tile % 32)) - 1)
        place = tl.load(tiles.begin + row, mask=listed, other=0) + _count_bits(earlier)
        place += tl.load(tiles.before + at, mask=listed, other=0)
        tl.store(tiles.tile + place, tile, mask=listed)
        if lists.membership is not None:
            bits = tl.load(lists.membership + flat * lists.width + slot, mask=listed, other=0)
            tl.store(tiles.membership + place, bits, mask=listed)


def sort_by_block(lists: Lists, blocks: int) -> TilesByBlock:
    """Sort the lists of all tiles, contiguous, by block."""
    num, idx, membership, _ = lists
    B, Hkv, num_tiles = num.shape
    rows, device = B * Hkv * blocks, idx.device
    bitmap = mark(num, idx, blocks, _CHUNK)
    row_words = bitmap.shape[1]
    before = torch.empty(rows, row_words, dtype=torch.int32, device=device)
    count = torch.empty(rows, dtype=torch.int32, device=device)
    _rank_kernel[(rows,)](
        bitmap_ptr=bitmap,
        before_ptr=before,
        count_ptr=count,
        row_words=row_words,
        CHUNK=_CHUNK,
        num_warps=2,
    )
    tiles = TilesByBlock(
        begin=count.cumsum(0, dtype=torch.int64) - count,
        length=count,
        tile=torch.empty(idx.numel(), dtype=idx.dtype, device=device),
        membership=None if membership is None else torch.empty_like(membership).view(-1),
        before=before,
    )
    _place_kernel[(B * Hkv * num_tiles,)](
        lists=lists,
        tiles=tiles,
        bitmap_ptr=bitmap,
        num_tiles=num_tiles,
        num_blocks=blocks,
        row_words=row_words,
        CHUNK=_CHUNK,
        num_warps=2,
    )
    return tiles
