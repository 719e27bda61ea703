"""Turn lists of blocks by tile into lists of tiles by block, for the backward pass."""

import torch
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator


@define_operator()
def transpose_blocks(num: Tensor, idx: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """List, for each block, the tiles whose list holds it.

    The listed (tile, block) pairs are sorted by block. Each row of the result has a slot for every
    tile, because every tile may list the same block; no other table of all pairs is made.

    Args:
        num: Blocks per tile, int32 ``[B, Hkv, Nq]``.
        idx: The blocks, int32 ``[B, Hkv, Nq, width]``, valid in the first ``num`` slots.
        num_blocks: Blocks in the sequence, ``Nkv``.

    Returns:
        ``q_num`` int32 ``[B, Hkv, Nkv]`` and ``q_idx`` int32 ``[B, Hkv, Nkv, Nq]``: tiles in
        ascending order, zero past the counts.
    """
    B, Hkv, Nq, width = idx.shape
    listed = torch.arange(width, device=idx.device) < num[..., None]
    head, tile, slot = listed.flatten(0, 1).nonzero(as_tuple=True)
    block = idx.flatten(0, 1)[head, tile, slot].long()
    row = head * num_blocks + block
    row, order = row.sort(stable=True)  # stable: tiles stay ascending within a block
    counts = torch.bincount(row, minlength=B * Hkv * num_blocks)
    starts = counts.cumsum(0) - counts
    q_idx = idx.new_zeros(B * Hkv * num_blocks, Nq)
    q_idx[row, torch.arange(len(row), device=idx.device) - starts[row]] = tile[order].int()
    return counts.int().view(B, Hkv, num_blocks), q_idx.view(B, Hkv, num_blocks, Nq)


@transpose_blocks.register_fake
def _(num: Tensor, idx: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    B, Hkv, Nq = num.shape
    return idx.new_empty(B, Hkv, num_blocks), idx.new_empty(B, Hkv, num_blocks, Nq)


cuda_launcher(transpose_blocks, "block_lists.kernels.transpose_blocks")
