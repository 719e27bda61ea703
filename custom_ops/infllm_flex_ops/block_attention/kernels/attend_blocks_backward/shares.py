"""Share the work on blocks that many tiles listed among several programs."""

from typing import NamedTuple

import torch
from torch import Tensor

_MOST_SHARES = 64  # per head, and a few more the longer the sequence
_LEAST_STRETCH = 256  # tiles worth a program of its own


class Shares(NamedTuple):
    """Which program sums which tiles of a shared block.

    Attributes:
        most: Shares that a head may have.
        stretch: Tiles per share.
        tables: Three int32 tensors. Shares per block, ``[heads, blocks]``, 0 where one program does
            it all; the block of each share, ``[heads, most]``, past the last block where unused;
            its number among the shares of its block, ``[heads, most]``.
    """

    most: int
    stretch: int
    tables: tuple[Tensor, Tensor, Tensor]


def choose_stretch(num_pairs: int, blocks: int) -> int:
    """Choose how many tiles a share holds: as many as a block could have on average, or more.

    Args:
        num_pairs: Most (tile, block) pairs that a head's lists can hold.
        blocks: Blocks of the head.
    """
    return max(_LEAST_STRETCH, num_pairs // blocks)


def cut_long_lists(count: Tensor, stretch: int) -> Shares:
    """Cut the lists of blocks that are much longer than others.

    Args:
        count: Tiles that listed each block, int32 ``[heads, blocks]``.
        stretch: Tiles per share.

    Returns:
        The shares; their number is bounded by shapes alone, so nothing waits for the device.
    """
    blocks = count.shape[-1]
    most = _MOST_SHARES + blocks // 16
    shares = (count + (stretch - 1)) // stretch
    shares = torch.where(shares > 1, shares, 0)
    shares = torch.where(shares.cumsum(-1) > most, 0, shares)  # beyond it blocks stay whole
    end = shares.cumsum(-1)
    share = torch.arange(most, device=count.device).expand(len(count), most).contiguous()
    block_of = torch.searchsorted(end, share, right=True)
    begin = (end - shares).gather(1, block_of.clamp(max=blocks - 1))
    first_of = share - begin
    return Shares(most, stretch, (shares.int(), block_of.int(), first_of.int()))
