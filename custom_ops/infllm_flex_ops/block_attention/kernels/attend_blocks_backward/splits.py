"""Split the work on blocks that many tiles listed among several programs."""

from typing import NamedTuple

import torch
from torch import Tensor

_MIN_SPLIT_SIZE = 256  # tiles worth a program of its own
_MAX_SPLITS = 64  # per head; longer sequences have some more


class Splits(NamedTuple):
    """Which program sums which tiles of a block with many tiles; int32 tensors.

    Attributes:
        per_block: Splits of each block ``[heads, blocks]``; 0 where one program takes it whole.
        block: Block of each split ``[heads, max_splits]``; past the last block if unused.
        number: Number of each split within its block ``[heads, max_splits]``.
    """

    per_block: Tensor
    block: Tensor
    number: Tensor


def choose_split_size(num_pairs: int, blocks: int) -> int:
    """Choose how many tiles a split holds: the average list of a block, or more.

    Args:
        num_pairs: Most (tile, block) pairs that a head's lists can hold.
        blocks: Blocks of the head.
    """
    return max(_MIN_SPLIT_SIZE, num_pairs // blocks)


def bound_splits(blocks: int) -> int:
    """Bound the splits of a head by shapes alone, so that the host waits for no count."""
    return _MAX_SPLITS + blocks // 16


def split_long_lists(count: Tensor, split_size: int, max_splits: int) -> Splits:
    """Split the blocks that more than ``split_size`` tiles listed.

    Args:
        count: Tiles that listed each block, int32 ``[heads, blocks]``.
        split_size: Tiles per split.
        max_splits: Most splits of a head; blocks beyond it stay whole.
    """
    blocks = count.shape[-1]
    splits = (count + (split_size - 1)) // split_size
    splits = torch.where(splits > 1, splits, 0)
    splits = torch.where(splits.cumsum(-1) > max_splits, 0, splits)
    end = splits.cumsum(-1)
    split = torch.arange(max_splits, device=count.device).expand(len(count), max_splits)
    block = torch.searchsorted(end, split.contiguous(), right=True)
    begin = (end - splits).gather(1, block.clamp(max=blocks - 1))
    return Splits(splits.int(), block.int(), (split - begin).int())
