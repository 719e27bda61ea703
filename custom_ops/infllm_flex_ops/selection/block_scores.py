"""Turn scores of windows into a choice of blocks, in plain tensors; no operator itself.

Shared by ``select_blocks`` and ``select_cached_blocks``, so that a query's choice has the same bits
wherever it is made. Tensors are ``[..., T, ...]`` for T queries at consecutive positions, which are
given as a ``range``: one query at a time, nothing needs to be computed per position.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Windows are scored in groups of so many. In matrix products of whole groups of columns, and of a
# multiple of a few rows, the bits of a row depend neither on how many rows there are nor on the
# threads: so it is with the library that PyTorch ships for x86, with AVX2 and AVX-512, where other
# widths take other paths as soon as threads share them.
COLUMNS = 64
_INVISIBLE = -1.0  # ranks below every score, since scores are sums of exponentials
_LARGEST = 1e38  # of a dot product: what lies beyond ranks like it
_FEW_LISTS = 64
_FIRST, _NEVER = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min


class Windows(NamedTuple):
    """Pooling windows: their size in tokens, and the step between them."""

    size: int
    stride: int

    def seen_from(self, position: int) -> int:
        """Count the windows that lie wholly at or before ``position``."""
        return max(0, (position + 1 - self.size) // self.stride + 1)

    def scored_to(self, position: int) -> int:
        """Count the windows that are scored to see those up to ``position``: whole groups."""
        return -(-self.seen_from(position) // COLUMNS) * COLUMNS


class Rule(NamedTuple):
    """What decides a choice beside queries and keys."""

    windows: Windows
    coarse_windows: Windows  # of no account to one query per group, which needs no normaliser
    block_size: int
    init_blocks: int
    local_blocks: int
    scale: float


def list_all(positions: range, width: int, rule: Rule, device: torch.device) -> Tensor:
    """List every block up to each query's own: ``[T, width]``, -1 after it."""
    block = torch.arange(width, device=device)
    position = torch.arange(positions.start, positions.stop, device=device)
    return torch.where(block <= position[:, None] // rule.block_size, block, -1)


def weigh_windows(logits: Tensor, coarse_logits: Tensor, positions: range, rule: Rule) -> Tensor:
    """Weigh windows by their logits ``[..., T, G, C']``, summed over the group: ``[..., T, C']``.

    Overwrites both arguments. Windows that a query does not see score below all that it sees.
    """
    coarse_size = rule.coarse_windows.size
    _hide_unseen(coarse_logits, positions, rule.coarse_windows, -torch.inf)
    lse = coarse_logits.logsumexp(-1, keepdim=True)
    if positions[0] < coarse_size - 1:  # some see no coarse key: the compressed ones serve
        hidden = _hide_unseen(logits.clone(), positions, rule.windows, -torch.inf)
        position = torch.arange(positions.start, positions.stop, device=lse.device)
        sees_coarse = (position >= coarse_size - 1)[:, None, None]
        lse = torch.where(sees_coarse, lse, hidden.logsumexp(-1, keepdim=True))
    weights = logits.sub_(lse).exp_().sum(-2)  # [..., T, C']
    weights.nan_to_num_(nan=0.0, posinf=torch.finfo(torch.float32).max)
    _hide_unseen(weights.unsqueeze(-2), positions, rule.windows, _INVISIBLE)
    return weights


def _hide_unseen(x: Tensor, positions: range, windows: Windows, value: float) -> Tensor:
    """Overwrite in ``x [..., T, G, C']`` the windows that end after the token's position."""
    seen_by_all = windows.seen_from(positions[0])
    tail = x[..., seen_by_all:]
    if windows.seen_from(positions[-1]) == seen_by_all:
        tail.fill_(value)
        return x
    ends = torch.arange(seen_by_all, x.shape[-1], device=x.device) * windows.stride
    position = torch.arange(positions.start, positions.stop, device=x.device)
    unseen = ends + windows.size - 1 > position[:, None]
    tail.masked_fill_(unseen[:, None], value)
    return x


def pool_to_blocks(weights: Tensor, num_blocks: int, rule: Rule) -> Tensor:
    """Take each block's best overlapping window: ``[..., C'] -> [..., num_blocks]``, float32."""
    per_block = rule.block_size // rule.windows.stride
    overlap = rule.windows.size // rule.windows.stride - 1  # windows that begin before the block
    missing = max(0, num_blocks * per_block - weights.shape[-1])
    padded = F.pad(weights, (overlap, missing), value=_INVISIBLE)
    scores = F.max_pool1d(padded, per_block + overlap, per_block)
    return scores[..., :num_blocks].float()


def rank_blocks(logits: Tensor, positions: range, num_blocks: int, rule: Rule) -> Tensor:
    """Score blocks by the best dot product of one query with their windows, which do not overlap.

    Overwrites ``logits``. One query needs no normaliser: dot products order its blocks as their
    softmax would. ``pick_best`` orders non-negative floats by their bits, so each product becomes
    the non-negative float of its rank: its lowest bit is dropped, and the rest keeps the order.

    Args:
        logits: float32 ``[..., T, C']``.
        positions: Of the T queries.
        num_blocks: How many blocks to score.
        rule: Windows and blocks.

    Returns:
        float32 ``[..., T, num_blocks]``; negative where no window of a block is visible. A nan
        ranks below every number.
    """
    logits.nan_to_num_(nan=-_LARGEST, posinf=_LARGEST, neginf=-_LARGEST)
    _hide_unseen(logits.unsqueeze(-2), positions, rule.windows, -torch.inf)
    per_block = rule.block_size // rule.windows.stride
    missing = max(0, num_blocks * per_block - logits.shape[-1])
    padded = F.pad(logits, (0, missing), value=-torch.inf)
    best = F.max_pool1d(padded, per_block, per_block)[..., :num_blocks].float()
    bits = best.clamp(-_LARGEST, _LARGEST).view(torch.int32)
    rank = ((bits ^ (bits >> 31 & 0x7FFFFFFF)) >> 1) + (1 << 30)
    return rank.view(torch.float32).masked_fill(best == -torch.inf, _INVISIBLE)


def pick_best(scores: Tensor, positions: range, K: int, rule: Rule) -> Tensor:
    """Choose by forced first, score descending, block ascending.

    Args:
        scores: ``[..., T, num_blocks]``, at least K blocks.
        positions: Of the T queries.
        K: Budget.
        rule: Which blocks are forced.

    Returns:
        int32 ``[..., T, K]``, ascending, -1 for unused slots.
    """
    own = range(positions[0] // rule.block_size, positions[-1] // rule.block_size + 1)
    between = range(rule.init_blocks, own[0] - rule.local_blocks)
    is_short = scores.numel() <= _FEW_LISTS * scores.shape[-1]
    if is_short and len(own) == 1 and len(between) >= K - rule.init_blocks - rule.local_blocks - 1:
        lists = _pick_between(scores, between, own[0], K)
        chosen = torch.tensor(lists, dtype=torch.int32, device=scores.device)
        return chosen.view(*scores.shape[:-1], K)
    num_blocks = scores.shape[-1]
    block = torch.arange(num_blocks, device=scores.device)
    position = torch.arange(positions.start, positions.stop, device=scores.device)
    mine = position[:, None] // rule.block_size
    forced = (block < rule.init_blocks) | (block >= mine - rule.local_blocks)
    # Non-negative floats order as their bits do, so bits above index make one unique key.
    key = scores.view(torch.int32).long() << 32 | (num_blocks - block)
    key = key.masked_fill_(forced, _FIRST).masked_fill_(block > mine, _NEVER)
    best, index = key.topk(K, dim=-1, sorted=False)
    index = index.masked_fill_(best == _NEVER, num_blocks).sort(-1).values
    return torch.where(index == num_blocks, -1, index).int()


def _pick_between(scores: Tensor, between: range, own: int, K: int) -> list[list[int]]:
    """Choose for a few queries of one block, who share the forced blocks on both sides.

    As Python lists: they are short, and operations on tensors would take longer.
    """
    first, last = list(range(between.start)), list(range(between.stop, own + 1))
    free = scores[..., between.start : between.stop]
    ranked = free.sort(dim=-1, descending=True, stable=True).indices
    best = ranked[..., : K - len(first) - len(last)].flatten(0, -2).tolist()
    return [first + [between.start + i for i in sorted(chosen)] + last for chosen in best]


def pick_lists(scores: Tensor, position: int, K: int, rule: Rule) -> list[list[int]]:
    """Choose as `pick_best` does, for ``[H, num_blocks]`` of one query, as Python lists."""
    own = position // rule.block_size
    between = range(rule.init_blocks, own - rule.local_blocks)
    if len(between) >= K - rule.init_blocks - rule.local_blocks - 1:
        return _pick_between(scores, between, own, K)
    chosen = pick_best(scores[:, None], range(position, position + 1), K, rule)
    return [[block for block in blocks if block >= 0] for blocks in chosen[:, 0].tolist()]
