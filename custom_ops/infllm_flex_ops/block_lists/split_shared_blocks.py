"""Split a selection: blocks shared by every token of a tile, and what remains per token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex_ops.block_lists.tile_blocks import tile_blocks
from infllm_flex_ops.block_lists.union_lists import union_width
from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.sizes import ceil_div


@define_operator()
def split_shared_blocks(
    selected: Tensor, kv_len: int, block_size: int, tile_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """List the blocks that every token of a tile selected and sees whole, and each token's others.

    Args:
        selected: int32 ``[B, Hkv, Sq, K]``, ascending, -1 for unused slots.
        kv_len: Keys in the sequence; the queries are its last ``Sq`` positions.
        block_size: Keys per block.
        tile_tokens: Tokens per tile, 1 to 64. The last tile may hold fewer.

    Returns:
        Three int32 tensors; W is the smaller of K and the blocks in the sequence.
        ``num [B, Hkv, Nq]`` and ``idx [B, Hkv, Nq, W]``: the shared blocks, ascending, zero past
        their count. ``rest [B, Hkv, Sq, K]``: the other blocks of each token, without those that
        begin after it, ascending, -1 in unused slots.
    """
    Sq, K = selected.shape[2:]
    num_blocks = ceil_div(kv_len, block_size)
    width = union_width(K, tile_tokens, num_blocks)
    _, _, _, num, idx = tile_blocks(selected, kv_len, block_size, tile_tokens, width)
    idx = idx[..., : min(K, num_blocks)].contiguous()

    tiles = F.pad(selected, (0, 0, 0, -Sq % tile_tokens), value=-1)
    tiles = tiles.unflatten(2, (-1, tile_tokens)).flatten(3)  # [B, Hkv, Nq, tile_tokens * K]
    slot = torch.arange(idx.shape[3], device=idx.device)
    listed = torch.where(slot < num[..., None], idx, torch.iinfo(torch.int32).max)
    at = torch.searchsorted(listed, tiles.contiguous(), out_int32=True)
    is_shared = listed.gather(3, at.clamp(max=idx.shape[3] - 1).long()) == tiles
    is_shared = is_shared.unflatten(3, (tile_tokens, K)).flatten(2, 3)[:, :, :Sq]
    position = torch.arange(kv_len - Sq, kv_len, device=selected.device)[:, None]
    remains = ~is_shared & (selected >= 0) & (selected * block_size <= position)
    place = torch.where(remains, remains.cumsum(-1) - 1, K)  # an extra slot takes the shared blocks
    rest = selected.new_full((*selected.shape[:3], K + 1), -1)
    return num, idx, rest.scatter_(3, place, selected)[..., :K].contiguous()


@split_shared_blocks.register_fake
def _(
    selected: Tensor, kv_len: int, block_size: int, tile_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, Hkv, Sq, K = selected.shape
    num = selected.new_empty(B, Hkv, ceil_div(Sq, tile_tokens))
    width = union_width(K, 1, (kv_len + block_size - 1) // block_size)
    return num, selected.new_empty(*num.shape, width), selected.new_empty(selected.shape)


cuda_launcher(split_shared_blocks, "block_lists.kernels.split_shared_blocks")
