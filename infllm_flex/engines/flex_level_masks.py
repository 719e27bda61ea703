"""Masks for FlexAttention that need no test of membership: one per level of tiles.

FlexAttention tests every element of a block that only some tokens of a tile selected, which costs
several times a full block. A selection is therefore split over levels. The first level takes the
blocks that all tokens of a large tile selected and see whole. The next level does the same on
smaller tiles with the blocks that remain. The last level lists the rest token by token, where only
the causal test is needed. Attention under the levels is merged by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import infllm_flex_ops
from infllm_flex.config import InfLLMConfig
from infllm_flex_ops import torch_private
from infllm_flex_ops.block_lists.membership import MAX_TILE_TOKENS
from infllm_flex_ops.sizes import ceil_div

_LEAST_ROWS = 16  # the fewest that matrix instructions take, and FlexAttention's backward
# The tile that FlexAttention's kernels are fastest with, one of two tokens of 16 heads, and the
# smallest. A level between these would save less than its merge costs.
_TILE_ROWS = (128, 32, _LEAST_ROWS)
_LEAST_GROUP = 4  # with fewer heads, most of a token's matrix instruction would be idle
_MAX_LIST_BYTES = 1 << 30  # of one call's lists of tiles by block

_MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Level(NamedTuple):
    """The tiles of a level.

    Attributes:
        tokens: Per tile.
        rows: Rows of the folded query per token: G, and padding.
    """

    tokens: int
    rows: int


def can_split(G: int) -> bool:
    """Whether the rows of a token keep matrix instructions busy, and several tokens fit a tile."""
    return _LEAST_GROUP <= G < _TILE_ROWS[0]


def choose_levels(G: int, *, backward: bool = False) -> list[Level]:
    """Choose the levels over which blocks are split, large tiles first, single tokens last.

    Args:
        G: Query heads per KV head.
        backward: Whether gradients are needed; their matrix products take at least 16 rows.
    """
    even = G % _LEAST_ROWS == 0
    rows = G if even else 1 << (G - 1).bit_length()
    sizes = {min(MAX_TILE_TOKENS, _floor_power(max(1, size // rows))) for size in _TILE_ROWS}
    levels = [Level(tokens, rows) for tokens in sorted(sizes, reverse=True) if tokens > 1]
    return [*levels, Level(1, max(rows, _LEAST_ROWS) if backward else rows)]


def can_split_backward(B: int, Hkv: int, Sq: int, num_blocks: int, G: int) -> bool:
    """Whether the lists of the backward fit in memory: a block may be in the list of every tile."""
    tiles = sum(ceil_div(Sq, level.tokens) for level in choose_levels(G))
    list_bytes = 4 * B * Hkv * num_blocks * tiles
    return can_split(G) and list_bytes <= _MAX_LIST_BYTES


def build_level_masks(
    selected: Tensor,
    config: InfLLMConfig,
    levels: list[Level],
    *,
    kv_len: int,
    q_offset: int,
    backward: bool = False,
) -> list[BlockMask]:
    """Split a selection into the blocks that tiles share and those of single tokens.

    Args:
        selected: int32 ``[B, Hkv, Sq, K]``, ascending, -1 for unused slots.
        config: Sparsity settings.
        levels: Tiles, large ones first and single tokens last, as from ``choose_levels``.
        kv_len: Keys in the sequence.
        q_offset: Position of the first query.
        backward: Also list the tiles of each block, which FlexAttention's backward walks.

    Returns:
        One mask per level, ``[B, Hkv, Sq * rows, kv_len]`` with ``BLOCK_SIZE = (tokens * rows,
        block_size)`` and one list. The query is folded as in `build_block_mask`, with the rows of
        a token padded from G. The masks are disjoint, and together every query sees its blocks,
        causally. A mask may leave rows empty, and is exact only with its lists.
    """
    K = selected.shape[3]
    block = config.block_size
    num_blocks = ceil_div(kv_len, block)
    kv_end = q_offset + selected.shape[2]
    masks = []
    mask_mod: _MaskMod
    for tokens, rows in levels:
        if tokens > 1:
            num, idx, selected = infllm_flex_ops.split_shared_blocks(
                selected, kv_end, block, tokens
            )
            mask_mod = _everything
        else:
            num, idx, *_ = infllm_flex_ops.tile_blocks(
                selected, kv_end, block, 1, min(K, num_blocks), separate_full=False
            )
            mask_mod = _causal(q_offset, rows, selected.device)
        tiles = torch_private.NO_LISTS
        if backward:
            tiles = infllm_flex_ops.transpose_blocks(num, idx, num_blocks)
        lengths = (selected.shape[2] * rows, kv_len)
        size = (tokens * rows, block)
        masks.append(torch_private.block_mask(lengths, size, mask_mod, kv=(num, idx), q=tiles))
    return masks


def _floor_power(x: int) -> int:
    return 1 << x.bit_length() - 1


def _everything(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx == q_idx  # always true, as compilers know: they remove the test


def _causal(q_offset: int, rows: int, device: torch.device) -> _MaskMod:
    # A tensor: a captured number would be compiled into the graph, and again for every new value.
    first_position = torch.full((1,), q_offset, dtype=torch.int32, device=device)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= q_idx // rows + first_position[0]

    return mask_mod
