"""Masks for FlexAttention that need no test of membership: shared blocks, and each token's own.

A block that only some tokens of a tile selected costs FlexAttention a test per element, four to
five times a full block. So a choice of blocks is dealt out over levels: of a large tile's blocks
the first level takes those that all its tokens selected and see whole, the next does so with what
is left on smaller tiles, and the last lists the rest token by token, where only the causal test
remains. Attention under the levels is merged by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import infllm_flex_ops
from infllm_flex.config import InfLLMConfig
from infllm_flex_ops.block_lists.tile_blocks import MAX_TILE_TOKENS

_LEAST_ROWS = 16  # the least that matrix instructions take, and FlexAttention's backward
# The tile that FlexAttention's kernels are fastest with, one of two tokens of 16 heads, and the
# least. On one H100 at 64K tokens with 16 heads the levels take 25.6 ms without the second, 22.2
# with it, 21.7 with one of 64 rows besides, which merging takes again.
_TILE_ROWS = (128, 32, _LEAST_ROWS)
_LEAST_GROUP = 4  # below, most of a single token's instructions would be idle
_MAX_LIST_BYTES = 1 << 30  # of one call's lists of tiles by block

_MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Level(NamedTuple):
    """Tiles of so many tokens, each with so many rows of the folded query: G and padding."""

    tokens: int
    rows: int


def can_split(num_groups: int) -> bool:
    """Whether one token's rows keep matrix instructions busy, and several tokens fit in a tile."""
    return _LEAST_GROUP <= num_groups < _TILE_ROWS[0]


def choose_levels(num_groups: int, *, backward: bool = False) -> list[Level]:
    """Choose the tiles over which blocks are dealt out, large ones first, single tokens last.

    Args:
        num_groups: Query heads per KV head, ``G``.
        backward: Whether gradients are wanted, whose matrix products take 16 rows at least.
    """
    even = num_groups % _LEAST_ROWS == 0
    rows = num_groups if even else 1 << (num_groups - 1).bit_length()
    sizes = {min(MAX_TILE_TOKENS, _floor_power(max(1, size // rows))) for size in _TILE_ROWS}
    levels = [Level(tokens, rows) for tokens in sorted(sizes, reverse=True) if tokens > 1]
    return [*levels, Level(1, max(rows, _LEAST_ROWS) if backward else rows)]


def can_split_backward(B: int, Hkv: int, Sq: int, num_blocks: int, num_groups: int) -> bool:
    """Whether the backward's lists fit: any block may be in the list of every tile."""
    tiles = sum(-(-Sq // level.tokens) for level in choose_levels(num_groups))
    list_bytes = 4 * B * Hkv * num_blocks * tiles
    return can_split(num_groups) and list_bytes <= _MAX_LIST_BYTES


def build_split_masks(
    selected: Tensor,
    config: InfLLMConfig,
    levels: list[Level],
    *,
    kv_len: int,
    first: int,
    backward: bool = False,
) -> list[BlockMask]:
    """Split a choice of blocks into what tiles of tokens share and what is a token's own.

    Args:
        selected: int32 ``[B, Hkv, Sq, K]``, ascending, -1 for unused slots.
        config: Sparsity settings.
        levels: Tiles, large ones first and single tokens last, as from ``choose_levels``.
        kv_len: Keys in the sequence.
        first: Position of the first query.
        backward: Also list the tiles of each block, which FlexAttention's backward walks.

    Returns:
        One mask per level, ``[B, Hkv, Sq * rows, kv_len]`` with ``BLOCK_SIZE = (tokens * rows,
        block_size)`` and one list each; the query is folded as in `build_block_mask`, a token's
        rows padded from G. They overlap nowhere and together let every query see its blocks,
        causally. Any may leave rows empty. None is exact without its lists.
    """
    K = selected.shape[3]
    block = config.block_size
    num_blocks = (kv_len + block - 1) // block
    kv_end = first + selected.shape[2]
    masks = []
    mask_mod: _MaskMod
    for tokens, rows in levels:
        if tokens > 1:
            num, idx, selected = infllm_flex_ops.share_blocks(selected, kv_end, block, tokens)
            mask_mod = _everything
        else:
            num, idx, *_ = infllm_flex_ops.tile_blocks(
                selected, kv_end, block, 1, min(K, num_blocks), separate_full=False
            )
            mask_mod = _causal(first, rows, selected.device)
        tiles = infllm_flex_ops.transpose_blocks(num, idx, num_blocks) if backward else (None, None)
        masks.append(
            BlockMask(
                seq_lengths=(selected.shape[2] * rows, kv_len),
                kv_num_blocks=num,
                kv_indices=idx,
                full_kv_num_blocks=None,
                full_kv_indices=None,
                q_num_blocks=tiles[0],
                q_indices=tiles[1],
                full_q_num_blocks=None,
                full_q_indices=None,
                BLOCK_SIZE=(tokens * rows, block),
                mask_mod=mask_mod,
            )
        )
    return masks


def _floor_power(x: int) -> int:
    return 1 << x.bit_length() - 1


def _everything(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx == q_idx  # compilers know, and leave the test out


def _causal(first: int, rows: int, device: torch.device) -> _MaskMod:
    # A tensor, since a captured number that changes from call to call would be compiled anew.
    first_position = torch.full((1,), first, dtype=torch.int32, device=device)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= q_idx // rows + first_position[0]

    return mask_mod
