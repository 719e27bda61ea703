"""Turn scores of windows into a selection of blocks, in plain tensors; no operator itself.

Shared by ``select_blocks`` and ``select_cached_blocks``, so that a query's selection has the same
bits in both. Tensors are ``[..., T, ...]`` for T queries at consecutive positions, which are given
as a ``range``: for one query, nothing then has to be computed per position.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex_ops.selection.rule import SelectionRule, Windows

_INVISIBLE = -1.0  # ranks below every score, since scores are sums of exponentials
_LARGEST = 1e38  # larger dot products rank like this one
_FEW_LISTS = 64
_FORCED, _NEVER = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min


def list_all_blocks(
    positions: range, width: int, rule: SelectionRule, device: torch.device
) -> Tensor:
    """List every block up to each query's own: ``[T, width]``, -1 after it."""
    block = torch.arange(width, device=device)
    position = torch.arange(positions.start, positions.stop, device=device)
    return torch.where(block <= position[:, None] // rule.block_size, block, -1)


def score_windows(
    logits: Tensor, coarse_logits: Tensor, positions: range, rule: SelectionRule
) -> Tensor:
    """Score windows by their logits ``[..., T, G, C']``, summed over the group: ``[..., T, C']``.

    Overwrites both arguments. Windows that a query does not see score below all that it sees.
    """
    coarse_size = rule.coarse_size
    _mask_invisible(coarse_logits, positions, rule.coarse_windows, -torch.inf)
    lse = coarse_logits.logsumexp(-1, keepdim=True)
    if positions[0] < coarse_size - 1:  # some see no coarse key: the compressed keys normalise
        masked = _mask_invisible(logits.clone(), positions, rule.windows, -torch.inf)
        position = torch.arange(positions.start, positions.stop, device=lse.device)
        sees_coarse = (position >= coarse_size - 1)[:, None, None]
        lse = torch.where(sees_coarse, lse, masked.logsumexp(-1, keepdim=True))
    weights = logits.sub_(lse).exp_().sum(-2)  # [..., T, C']
    weights.nan_to_num_(nan=0.0, posinf=torch.finfo(torch.float32).max)
    _mask_invisible(weights.unsqueeze(-2), positions, rule.windows, _INVISIBLE)
    return weights


def _mask_invisible(x: Tensor, positions: range, windows: Windows, value: float) -> Tensor:
    """Overwrite in ``x [..., T, G, C']`` the windows that end after the query's position."""
    seen_by_all = windows.num_visible(positions[0])
    tail = x[..., seen_by_all:]
    if windows.num_visible(positions[-1]) == seen_by_all:
        tail.fill_(value)
        return x
    starts = torch.arange(seen_by_all, x.shape[-1], device=x.device) * windows.stride
    position = torch.arange(positions.start, positions.stop, device=x.device)
    invisible = starts + windows.size - 1 > position[:, None]
    tail.masked_fill_(invisible[:, None], value)
    return x


def pool_to_blocks(weights: Tensor, num_blocks: int, rule: SelectionRule) -> Tensor:
    """Take each block's best overlapping window: ``[..., C'] -> [..., num_blocks]``, float32."""
    per_block = rule.block_size // rule.kernel_stride
    overlap = rule.kernel_size // rule.kernel_stride - 1  # windows that begin before the block
    missing = max(0, num_blocks * per_block - weights.shape[-1])
    padded = F.pad(weights, (overlap, missing), value=_INVISIBLE)
    scores = F.max_pool1d(padded, per_block + overlap, per_block)
    return scores[..., :num_blocks].float()


def rank_blocks(logits: Tensor, positions: range, num_blocks: int, rule: SelectionRule) -> Tensor:
    """Score blocks by the best dot product of one query with their windows, which do not overlap.

    Overwrites ``logits``. One query needs no normaliser: dot products order its blocks as their
    softmax would. ``topk_blocks`` orders non-negative floats by their bits, so each product becomes
    the non-negative float of its rank: its lowest bit is dropped, and the rest keeps the order.

    Args:
        logits: float32 ``[..., T, C']``.
        positions: Positions of the T queries.
        num_blocks: Blocks to score.
        rule: Windows and blocks.

    Returns:
        float32 ``[..., T, num_blocks]``; negative where no window of a block is visible. A NaN
        ranks below every number.
    """
    logits.nan_to_num_(nan=-_LARGEST, posinf=_LARGEST, neginf=-_LARGEST)
    _mask_invisible(logits.unsqueeze(-2), positions, rule.windows, -torch.inf)
    per_block = rule.block_size // rule.kernel_stride
    missing = max(0, num_blocks * per_block - logits.shape[-1])
    padded = F.pad(logits, (0, missing), value=-torch.inf)
    best = F.max_pool1d(padded, per_block, per_block)[..., :num_blocks].float()
    # Adding 0 makes a negative zero, which products of heads of one number are, a positive one.
    bits = best.clamp(-_LARGEST, _LARGEST).add_(0.0).view(torch.int32)
    rank = ((bits ^ (bits >> 31 & 0x7FFFFFFF)) >> 1) + (1 << 30)
    return rank.view(torch.float32).masked_fill(best == -torch.inf, _INVISIBLE)


def topk_blocks(scores: Tensor, positions: range, K: int, rule: SelectionRule) -> Tensor:
    """Select blocks: forced blocks first, then by score descending, then by block ascending.

    Args:
        scores: ``[..., T, num_blocks]``, at least K blocks.
        positions: Positions of the T queries.
        K: Budget.
        rule: Which blocks are forced.

    Returns:
        int32 ``[..., T, K]``, ascending, -1 for unused slots.
    """
    own = range(positions[0] // rule.block_size, positions[-1] // rule.block_size + 1)
    free = range(rule.init_blocks, own[0] - rule.local_blocks)
    is_short = scores.numel() <= _FEW_LISTS * scores.shape[-1]
    if is_short and len(own) == 1 and len(free) >= K - rule.init_blocks - rule.local_blocks - 1:
        lists = _topk_free(scores, free, own[0], K)
        selected = torch.tensor(lists, dtype=torch.int32, device=scores.device)
        return selected.view(*scores.shape[:-1], K)
    num_blocks = scores.shape[-1]
    block = torch.arange(num_blocks, device=scores.device)
    position = torch.arange(positions.start, positions.stop, device=scores.device)
    own_block = position[:, None] // rule.block_size
    forced = (block < rule.init_blocks) | (block >= own_block - rule.local_blocks)
    # Non-negative floats order as their bits do. Score bits above the block index make one unique
    # key, which decides ties as well.
    key = scores.view(torch.int32).long() << 32 | (num_blocks - block)
    key = key.masked_fill_(forced, _FORCED).masked_fill_(block > own_block, _NEVER)
    best, index = key.topk(K, dim=-1, sorted=False)
    index = index.masked_fill_(best == _NEVER, num_blocks).sort(-1).values
    return torch.where(index == num_blocks, -1, index).int()


def _topk_free(scores: Tensor, free: range, own: int, K: int) -> list[list[int]]:
    """Select for a few queries of one block, which share the forced blocks on both sides.

    The lists are short Python lists, since operations on tensors would take longer.

    Args:
        scores: ``[..., num_blocks]``.
        free: Blocks that are not forced; the forced ones lie before and after them.
        own: The block of the queries.
        K: Budget.
    """
    before, after = list(range(free.start)), list(range(free.stop, own + 1))
    order = scores[..., free.start : free.stop].sort(dim=-1, descending=True, stable=True).indices
    best = order[..., : K - len(before) - len(after)].flatten(0, -2).tolist()
    return [before + [free.start + i for i in sorted(row)] + after for row in best]


def topk_lists(scores: Tensor, position: int, K: int, rule: SelectionRule) -> list[list[int]]:
    """Select as ``topk_blocks`` does, for ``[H, num_blocks]`` of one query, as Python lists."""
    own = position // rule.block_size
    free = range(rule.init_blocks, own - rule.local_blocks)
    if len(free) >= K - rule.init_blocks - rule.local_blocks - 1:
        return _topk_free(scores, free, own, K)
    selected = topk_blocks(scores[:, None], range(position, position + 1), K, rule)
    return [[block for block in row if block >= 0] for row in selected[:, 0].tolist()]
