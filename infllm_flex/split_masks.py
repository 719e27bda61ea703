"""Two masks for FlexAttention that need no test of membership: shared blocks, and each token's own.

A block that only some tokens of a tile selected costs FlexAttention a test per element, four to
five times a full block. Of a large tile's blocks the first mask lists those that all its tokens
selected and see whole; the second lists the others, token by token. All are full but the block that
a token stands in, which is causal. Attention under the two is merged by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import custom_ops
from custom_ops.union_lists import union_width
from infllm_flex.config import InfLLMConfig

_SHARED_ROWS = 128  # the tile that FlexAttention's kernels are fastest with
_OWN_ROWS = 16  # the least that tensor cores take

_MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def can_split(num_groups: int) -> bool:
    """Whether one token's rows fill matrix instructions, and several tokens fit in a tile."""
    return num_groups % _OWN_ROWS == 0 and num_groups < _SHARED_ROWS


def build_split_masks(
    selected: Tensor, config: InfLLMConfig, *, kv_len: int, num_groups: int, first: int
) -> tuple[BlockMask, BlockMask]:
    """Split a choice of blocks into what tiles of tokens share and what is a token's own.

    Args:
        selected: int32 ``[B, Hkv, Sq, K]``, ascending, -1 for unused slots.
        config: Sparsity settings.
        kv_len: Keys in the sequence.
        num_groups: Query heads per KV head, ``G``; the query is folded as in `build_block_mask`.
        first: Position of the first query.

    Returns:
        Two masks of ``[B, Hkv, Sq * G, kv_len]`` that overlap nowhere and together let every query
        see its blocks, causally. Either may leave rows empty. Neither is exact without its lists.
    """
    Sq, K = selected.shape[2:]
    tile_tokens = 1 << (_SHARED_ROWS // num_groups).bit_length() - 1
    num_blocks = (kv_len + config.block_size - 1) // config.block_size
    width = union_width(K, tile_tokens, num_blocks)
    _, _, _, num, idx = custom_ops.tile_blocks(
        selected, first + Sq, config.block_size, tile_tokens, width
    )
    own = _without(selected, num, idx, tile_tokens)
    own_num, own_idx, _, own_full_num, own_full_idx = custom_ops.tile_blocks(
        own, first + Sq, config.block_size, 1, min(K, num_blocks)
    )
    causal = _causal(first, num_groups, selected.device)

    def mask(tokens: int, lists: tuple[Tensor, Tensor, Tensor, Tensor]) -> BlockMask:
        return BlockMask(
            seq_lengths=(Sq * num_groups, kv_len),
            kv_num_blocks=lists[0],
            kv_indices=lists[1],
            full_kv_num_blocks=lists[2],
            full_kv_indices=lists[3],
            q_num_blocks=None,
            q_indices=None,
            full_q_num_blocks=None,
            full_q_indices=None,
            BLOCK_SIZE=(tokens * num_groups, config.block_size),
            mask_mod=causal,
        )

    nothing = (torch.zeros_like(num), torch.zeros_like(idx))
    return (
        mask(tile_tokens, (*nothing, num, idx)),
        mask(1, (own_num, own_idx, own_full_num, own_full_idx)),
    )


def _without(selected: Tensor, num: Tensor, idx: Tensor, tile_tokens: int) -> Tensor:
    """Leave the blocks that a token's tile shares out of its choice; the rest moves up."""
    Sq, K = selected.shape[2:]
    tiles = F.pad(selected, (0, 0, 0, -Sq % tile_tokens), value=-1)
    tiles = tiles.unflatten(2, (-1, tile_tokens)).flatten(3)  # [B, Hkv, Nq, T * K]
    end = torch.iinfo(torch.int32).max
    slot = torch.arange(idx.shape[3], device=idx.device)
    listed = torch.where(slot < num[..., None], idx, end)
    at = torch.searchsorted(listed, tiles.contiguous(), out_int32=True)
    is_shared = listed.gather(3, at.clamp(max=idx.shape[3] - 1).long()) == tiles
    own = (~is_shared & (tiles >= 0)).unflatten(3, (tile_tokens, K)).flatten(2, 3)[:, :, :Sq]
    place = torch.where(own, own.cumsum(-1) - 1, K)
    left = selected.new_full((*selected.shape[:3], K + 1), -1)
    return left.scatter_(3, place, selected)[..., :K].contiguous()


def _causal(first: int, num_groups: int, device: torch.device) -> _MaskMod:
    # A tensor, since a captured number that changes from call to call would be compiled anew.
    first_position = torch.full((1,), first, dtype=torch.int32, device=device)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= q_idx // num_groups + first_position[0]

    return mask_mod
