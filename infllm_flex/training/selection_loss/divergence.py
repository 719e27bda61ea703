"""The selection loss and its gradients, some queries at a time.

`infllm_flex.reference_loss` defines it. Memory is linear in the number of keys, because no chunk of
queries has more than a fixed number of dot products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex.config import InfLLMConfig
from infllm_flex.training.selection_loss.sampled_queries import SampledQueries
from infllm_flex_ops.selection.rotary_dims import slowest_dims

_BISECTIONS = 20  # to the last digits of float32
CHUNK_PRODUCTS = 2**24  # 64 MiB in float32; a chunk needs several times as much


class LossGradients(NamedTuple):
    """A sum of losses and its gradients.

    Attributes:
        loss: float32 ``[]``, the sum over queries and key/value heads, in nats.
        query: ``[B, Hq, n, D]``, of the queries that were given.
        key: ``[B, Hkv, S, D]``.
    """

    loss: Tensor
    query: Tensor
    key: Tensor


class _Windows(NamedTuple):
    """Means of windows of keys ``[B, Hkv, C, D]``, and the shape of a window in keys."""

    keys: Tensor
    size: int
    stride: int


def selection_loss(
    query: Tensor,
    key: Tensor,
    queries: SampledQueries,
    config: InfLLMConfig,
    scale: float,
    chunk_products: int = CHUNK_PRODUCTS,
) -> LossGradients:
    """Compute the selection loss of some queries, and its gradients.

    Args:
        query: ``[B, Hq, n, D]``, the queries at the positions of ``queries``.
        key: ``[B, Hkv, S, D]``, whole rows.
        queries: Positions and documents.
        config: Sparsity settings. ``dense_len`` is not used, and no score is rounded to float8.
        scale: Factor on the dot products.
        chunk_products: Largest number of dot products of a chunk, unless one query has more.
    """
    with torch.enable_grad():
        query_leaf = query.detach().requires_grad_()
        key_leaf = key.detach().requires_grad_()
        keys = key_leaf if queries.layout is None else queries.layout.move_keys(key_leaf)
        whole = [_Windows(window_means(keys.float(), *w), *w) for w in _window_shapes(config)]
    # The chunks add to the gradients of the means; the keys get theirs once, at the end.
    windows = [w._replace(keys=w.keys.detach().requires_grad_()) for w in whole]
    keys = keys.detach().float()
    loss = keys.new_zeros(())
    per_query = query.shape[0] * query.shape[1] * keys.shape[2]
    step = max(1, chunk_products // per_query)
    for first in range(0, query.shape[2], step):
        chunk = slice(first, first + step)
        at = _Positions(*(x[:, chunk] for x in (queries.place, queries.start, queries.counts)))
        grouped = query_leaf[:, :, chunk].detach().float().unflatten(1, (keys.shape[1], -1))
        wanted = block_attention(grouped, keys, at, config.block_size, scale)
        with torch.enable_grad():
            grouped = query_leaf[:, :, chunk].float().unflatten(1, (keys.shape[1], -1))
            scores = log_scores(grouped, windows, at, config, scale, wanted.shape[-1])
            some = _divergence(scores, wanted, at, config)
            some.backward()
        loss += some.detach()
    torch.autograd.backward([w.keys for w in whole], [_gradient(w.keys) for w in windows])
    return LossGradients(loss, _gradient(query_leaf), _gradient(key_leaf))


class _Positions(NamedTuple):
    """Parts of the fields of `SampledQueries`, each ``[R, c]``."""

    place: Tensor
    start: Tensor
    counts: Tensor


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _window_shapes(config: InfLLMConfig) -> list[tuple[int, int]]:
    """Size and stride of the windows that are scored, and of those that normalise the scores."""
    shapes = [(config.kernel_size, config.kernel_stride)]
    if config.uses_coarse_keys:
        shapes.append((config.coarse_size, config.coarse_stride))
    return shapes


def window_means(key: Tensor, size: int, stride: int) -> Tensor:
    """Average whole windows of ``key [B, H, S, D]``: ``[B, H, C, D]``, deterministic in backward.

    ``stride`` divides ``size``.
    """
    S = key.shape[2]
    count = (S - size) // stride + 1 if size <= S else 0
    strides = key[:, :, : S // stride * stride].unflatten(2, (-1, stride)).mean(3)
    parts = [strides[:, :, first : first + count] for first in range(size // stride)]
    return torch.stack(parts).mean(0)


def block_attention(
    query: Tensor, key: Tensor, at: _Positions, block_size: int, scale: float
) -> Tensor:
    """Sum the dense attention of queries by block, averaged over the group.

    Args:
        query: float32 ``[B, Hkv, G, c, D]``.
        key: float32 ``[B, Hkv, S, D]``.
        at: Where the queries lie.
        block_size: Keys per block.
        scale: Factor on the dot products.

    Returns:
        float32 ``[B, Hkv, c, Nkv]``.
    """
    token = torch.arange(key.shape[2], device=key.device)
    seen = (token >= at.start[..., None]) & (token <= at.place[..., None])  # [R, c, S]
    logits = query @ key[:, :, None].mT * scale
    weights = logits.masked_fill_(~seen[:, None, None], -torch.inf).softmax(-1).mean(2)
    return F.pad(weights, (0, -key.shape[2] % block_size)).unflatten(-1, (-1, block_size)).sum(-1)


def log_scores(
    query: Tensor,
    windows: list[_Windows],
    at: _Positions,
    config: InfLLMConfig,
    scale: float,
    num_blocks: int,
) -> Tensor:
    """Compute the logarithm of the scores by which blocks are ranked.

    Args:
        query: float32 ``[B, Hkv, G, c, D]``.
        windows: The windows that are scored, and perhaps those that normalise the scores.
        at: Where the queries lie.
        config: Sparsity settings.
        scale: Factor on the dot products.
        num_blocks: Blocks of a row, ``Nkv``.

    Returns:
        float32 ``[B, Hkv, c, Nkv]``, -inf where no window of the block is visible.
    """
    if config.pool_queries:
        num_dims = config.num_score_dims(query.shape[-1])
        query = slowest_dims(query.mean(2, keepdim=True), num_dims)
        windows = [w._replace(keys=slowest_dims(w.keys, num_dims)) for w in windows]
    logits = _window_logits(query, windows[0], at, scale)
    if config.pool_queries:
        return _best_of_blocks(logits[:, :, 0], windows[0], config.block_size, num_blocks)
    lse = _finite_logsumexp(logits, -1)
    if len(windows) > 1:
        coarse = _finite_logsumexp(_window_logits(query, windows[1], at, scale), -1)
        lse = torch.where(coarse > -torch.inf, coarse, lse)
    # A query that sees no window has no score; 0 keeps its gradient finite.
    weights = _finite_logsumexp(logits - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None], 2)
    return _best_of_blocks(weights, windows[0], config.block_size, num_blocks)


def _window_logits(query: Tensor, windows: _Windows, at: _Positions, scale: float) -> Tensor:
    """Scaled dot products with windows, ``[B, Hkv, G, c, C]``; -inf where one is not visible."""
    first = torch.arange(windows.keys.shape[2], device=query.device) * windows.stride
    visible = (first >= at.start[..., None]) & (first + windows.size - 1 <= at.place[..., None])
    logits = query @ windows.keys[:, :, None].mT * scale
    return logits.masked_fill(~visible[:, None, None], -torch.inf)


def _finite_logsumexp(x: Tensor, dim: int) -> Tensor:
    """Log-sum-exp whose gradient is zero, not nan, where all elements are -inf."""
    if not x.shape[dim]:
        return x.sum(dim) - torch.inf
    empty = x.detach().amax(dim, keepdim=True) == -torch.inf
    total = x.masked_fill(empty, 0.0).logsumexp(dim)
    return total.masked_fill(empty.squeeze(dim), -torch.inf)


def _best_of_blocks(values: Tensor, windows: _Windows, block_size: int, count: int) -> Tensor:
    """The largest value among the windows that overlap each block: ``[..., C]`` to ``[..., Nkv]``.

    Windows that begin in an earlier block and end in this one overlap it as well.
    """
    per_block = block_size // windows.stride
    padded = F.pad(values, (0, count * per_block - values.shape[-1]), value=-torch.inf)
    best = padded.unflatten(-1, (count, per_block)).amax(-1)
    for before in range(1, windows.size // windows.stride):
        earlier = F.pad(padded, (before, 0), value=-torch.inf)[..., ::per_block][..., :count]
        best = torch.maximum(best, earlier)
    return best


def _divergence(scores: Tensor, wanted: Tensor, at: _Positions, config: InfLLMConfig) -> Tensor:
    """Sum the losses of queries: ``scores`` and ``wanted`` are ``[B, Hkv, c, Nkv]``."""
    own = (at.place // config.block_size)[..., None]
    init = (at.start // config.block_size)[..., None] + config.init_blocks
    block = torch.arange(scores.shape[-1], device=scores.device)
    chosen = (block >= init) & (block < own - config.local_blocks) & at.counts[..., None]
    chosen = chosen[:, None] & (scores > -torch.inf)  # [B, Hkv, c, Nkv]
    wanted = wanted.masked_fill(~chosen, 0.0)
    share = wanted / wanted.sum(-1, keepdim=True).clamp(min=torch.finfo(wanted.dtype).tiny)
    # A query without blocks to choose from gets equal scores, so that no gradient is nan.
    none = ~chosen.any(-1, keepdim=True)
    scores = scores.masked_fill(~chosen, 0.0)
    hidden = ~chosen & ~none
    exponent = _best_exponent(share, scores.detach(), hidden, config.kernel_size)
    log_score = (exponent * scores).masked_fill(hidden, -torch.inf).log_softmax(-1)
    return (torch.xlogy(wanted, share) - wanted * log_score.masked_fill(~chosen, 0.0)).sum()


def _best_exponent(share: Tensor, log_scores: Tensor, hidden: Tensor, largest: int) -> Tensor | int:
    """Find the exponent from 1 to ``largest`` that brings the scores of each query nearest.

    Arguments are ``[B, Hkv, c, Nkv]``, the result ``[B, Hkv, c, 1]``. It has no gradient: at the
    least divergence, a small change of the exponent changes nothing.
    """
    if largest == 1:
        return 1
    wanted = (share * log_scores).sum(-1, keepdim=True)
    low, high = torch.ones_like(wanted), torch.full_like(wanted, largest)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        weights = (middle * log_scores).masked_fill(hidden, -torch.inf).softmax(-1)
        too_flat = (weights * log_scores).sum(-1, keepdim=True) < wanted
        low, high = torch.where(too_flat, middle, low), torch.where(too_flat, high, middle)
    return (low + high) / 2
