"""The lists that ``attend_blocks`` walks: for each tile the union of its tokens' blocks."""

import math

import torch
from torch import Tensor

from infllm_flex_ops.block_lists.membership import MAX_TILE_TOKENS
from infllm_flex_ops.block_lists.tile_blocks import tile_blocks
from infllm_flex_ops.sizes import ceil_div

_TILE_ROWS = 64  # on the CPU; larger tiles load more blocks that few of their rows selected


def union_width(num_slots: int, tile_tokens: int, num_blocks: int) -> int:
    """Bound the size of any tile's union by what is known without reading the selection."""
    widest = tile_tokens * num_slots
    if isinstance(num_blocks, int) and isinstance(widest, int):
        return min(num_blocks, widest)  # torch 2.11 cannot trace sym_min of plain numbers
    return torch.sym_min(num_blocks, widest)


def list_blocks(
    selected: Tensor, kv_len: int, block_size: int, tile_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """List the union of the blocks that each tile's tokens selected.

    Args:
        selected: int32 ``[B, Hkv, Sq, K]``, ascending, -1 for unused slots.
        kv_len: Keys in the sequence; the queries are its last ``Sq`` positions.
        block_size: Keys per block.
        tile_tokens: Tokens per tile.

    Returns:
        Blocks per tile, int32 ``[B, Hkv, Nq]``; the blocks, int32 ``[B, Hkv, Nq, W]``, ascending;
        and their membership words ``[B, Hkv, Nq, W]``, as ``tile_blocks`` returns them.
    """
    num_blocks = ceil_div(kv_len, block_size)
    width = union_width(selected.shape[3], tile_tokens, num_blocks)
    lists = tile_blocks(selected, kv_len, block_size, tile_tokens, width, separate_full=False)
    return lists[0], lists[1], lists[2]


def choose_tile_tokens(G: int, rows: int = _TILE_ROWS, most: int = MAX_TILE_TOKENS) -> int:
    """Choose the tokens of a tile of about ``rows`` rows; a token has G, one per query head."""
    return min(most, max(1, rows // G))


def fit_unit(tile_tokens: int, unit: int | None) -> int:
    """Shrink tiles until a whole number of them fills the unit at whose multiples documents begin.

    Then no tile holds tokens of two documents, whose bits would depend on each other.
    """
    if unit is None:
        return tile_tokens
    return math.gcd(unit, 1 << (tile_tokens.bit_length() - 1))
