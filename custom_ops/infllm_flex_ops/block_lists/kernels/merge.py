"""Merge the ascending lists of a tile's tokens: shared by the kernels of this stage."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.triton_common.tensor_args import view

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


def merge_arguments(
    selected: Tensor, kv_len: int, block_size: int, tile_tokens: int
) -> tuple[int, dict[str, Any]]:
    """Count the programs of a merge, and collect the arguments by which they find their lists."""
    B, Hkv, Sq, K = selected.shape
    num_tiles = triton.cdiv(Sq, tile_tokens)
    total_tiles = B * Hkv * num_tiles
    tiling = choose_tiling(block_size, tile_tokens)
    return triton.cdiv(total_tiles, tiling.TILES), {
        "selected": view(selected),
        "Sq": Sq,
        "K": K,
        "q_offset": kv_len - Sq,
        "num_tiles": num_tiles,
        "total_tiles": total_tiles,
        "Hkv": Hkv,
        "TILING": tiling,
    }


class LaneLists(NamedTuple):
    """The lists of a program's tiles, one lane per token, in a kernel.

    Attributes:
        flat: Number of each tile among those of all heads ``[TILES]``.
        head: Its head among those of all rows ``[TILES]``.
        row: Query of each lane ``[TILES, LANES]``.
        real: Whether the lane has a query ``[TILES, LANES]``.
        own: Block of that query ``[TILES, LANES]``.
        num_past: Blocks that the tile's first token sees whole ``[TILES]``.
        ptr: Start of each list ``[TILES, LANES]``.
        stride: Step between the slots of a list.
        K: Slots of a list.
    """

    flat: Any
    head: Any
    row: Any
    real: Any
    own: Any
    num_past: Any
    ptr: Any
    stride: Any
    K: Any


@triton.jit
def locate_lists(selected, Sq, K, q_offset, num_tiles, total_tiles, Hkv, TILING: tl.constexpr):
    """Find the lists of a program's tiles.

    Args:
        selected: View of the selected blocks.
        Sq: Queries per row.
        K: Slots of a list.
        q_offset: Position of the first query.
        num_tiles: Tiles per head.
        total_tiles: Tiles of all heads.
        Hkv: KV heads.
        TILING: Compile-time sizes.
    """
    flat = tl.program_id(0).to(tl.int64) * TILING.TILES + tl.arange(0, TILING.TILES)
    head = flat // num_tiles
    tile = (flat % num_tiles).to(tl.int32)
    lane = tl.arange(0, TILING.LANES)
    row = tile[:, None] * TILING.TILE_TOKENS + lane[None, :]
    real = (flat < total_tiles)[:, None] & (lane < TILING.TILE_TOKENS)[None, :] & (row < Sq)
    own = (q_offset + row) // TILING.BLOCK_SIZE
    num_past = (q_offset + tile * TILING.TILE_TOKENS + 1) // TILING.BLOCK_SIZE
    ptr = selected.ptr + (head // Hkv * selected.b + head % Hkv * selected.h)[:, None]
    ptr += row.to(tl.int64) * selected.s
    return LaneLists(flat, head, row, real, own, num_past, ptr, selected.d, K)


@triton.jit
def next_block(lists, taken, mask):
    """Read the blocks at slots ``taken``; ``LIST_END`` after a list's last, and where masked out.

    A block that begins after its token ends the list.
    """
    at = lists.ptr + taken.to(tl.int64) * lists.stride
    block = tl.load(at, mask=mask & (taken < lists.K), other=-1)
    return tl.where((block < 0) | (block > lists.own), LIST_END, block)


@triton.jit
def pass_lowest(lists, taken, block, hit):
    """Replace the lowest blocks of a tile, which are ``hit``, by those at slots ``taken``."""
    return tl.where(hit, next_block(lists, taken, hit), block)
