"""Merge the ascending lists of a tile's tokens: shared by the kernels of this stage."""

from typing import NamedTuple

import triton
import triton.language as tl

LIST_END = tl.constexpr(0x7FFFFFFF)  # stands after a list's last block
_WARP = 32


class Tiling(NamedTuple):
    """Compile-time sizes of a merge.

    Attributes:
        BLOCK_SIZE: Keys per block.
        TILE_TOKENS: Tokens per tile.
        LANES: Tokens per tile, rounded up to a power of two: one lane each.
        TILES: Tiles per program.
    """

    BLOCK_SIZE: int
    TILE_TOKENS: int
    LANES: int
    TILES: int


def choose_tiling(block_size: int, tile_tokens: int) -> Tiling:
    """Choose as many tiles per program as the lanes of a warp hold, at least one."""
    lanes = triton.next_power_of_2(tile_tokens)
    return Tiling(block_size, tile_tokens, lanes, max(1, _WARP // lanes))


@triton.jit
def locate_lists(selected, Sq, q_offset, num_tiles, total_tiles, Hkv, TILING: tl.constexpr):
    """Find the lists of a program's tiles, one lane per token.

    Args:
        selected: View of the selected blocks.
        Sq: Queries per row.
        q_offset: Position of the first query.
        num_tiles: Tiles per head.
        total_tiles: Tiles of all heads.
        Hkv: KV heads.
        TILING: Compile-time sizes.

    Returns:
        flat ``[TILES]``: Number of each tile among those of all heads.
        head ``[TILES]``: Its head among those of all rows.
        row ``[TILES, LANES]``: Query of each lane.
        real ``[TILES, LANES]``: Whether the lane has a query.
        own ``[TILES, LANES]``: Block of that query.
        num_past ``[TILES]``: Blocks that the tile's first token sees whole.
        list_ptr ``[TILES, LANES]``: Start of each list.
    """
    flat = tl.program_id(0).to(tl.int64) * TILING.TILES + tl.arange(0, TILING.TILES)
    head = flat // num_tiles
    tile = (flat % num_tiles).to(tl.int32)
    lane = tl.arange(0, TILING.LANES)
    row = tile[:, None] * TILING.TILE_TOKENS + lane[None, :]
    real = (flat < total_tiles)[:, None] & (lane < TILING.TILE_TOKENS)[None, :] & (row < Sq)
    own = (q_offset + row) // TILING.BLOCK_SIZE
    num_past = (q_offset + tile * TILING.TILE_TOKENS + 1) // TILING.BLOCK_SIZE
    list_ptr = selected.ptr + (head // Hkv * selected.b + head % Hkv * selected.h)[:, None]
    list_ptr += row.to(tl.int64) * selected.s
    return flat, head, row, real, own, num_past, list_ptr


@triton.jit
def next_block(list_ptr, taken, own, stride, K, mask):
    """Read the blocks at slots ``taken``; ``LIST_END`` after a list's last, and where masked out.

    A block that begins after its token, whose own block is ``own``, ends the list.
    """
    at = list_ptr + taken.to(tl.int64) * stride
    block = tl.load(at, mask=mask & (taken < K), other=-1)
    return tl.where((block < 0) | (block > own), LIST_END, block)
