"""The definition of the selection loss in float64, slow and plain, one query at a time.

The loss of a query tells how far the scores of its blocks are from what dense attention does with
them. Blocks that are selected whatever their score have no part in it. For tests and for readers.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from infllm_flex.config import InfLLMConfig
from infllm_flex.reference import find_sequences, is_forced, score_blocks


def choosable_blocks(scores: Tensor, own: int, config: InfLLMConfig) -> list[int]:
    """List the blocks that a query may select because of their score.

    Args:
        scores: ``[Nkv]``, the block scores of the query.
        own: The query's own block.
        config: Sparsity settings.
    """
    return [n for n in range(own) if not is_forced(n, own, config) and scores[n] > -torch.inf]


def best_exponent(share: Tensor, log_scores: Tensor, largest: float) -> float:
    """Find the exponent of scores that brings them nearest to a distribution.

    The divergence is convex in the exponent. At its least, the mean logarithm of the score is the
    same under both distributions.

    Args:
        share: ``[N]``, the distribution.
        log_scores: ``[N]``.
        largest: The exponent is between 1 and this.
    """
    wanted = float(share @ log_scores)
    low, high = 1.0, largest
    for _ in range(60):
        middle = (low + high) / 2
        found = float((middle * log_scores).softmax(0) @ log_scores)
        low, high = (middle, high) if found < wanted else (low, middle)
    return (low + high) / 2


def query_loss(
    query: Tensor, key: Tensor, log_scores: Tensor, blocks: list[int], config: InfLLMConfig
) -> Tensor:
    """Compare dense attention with the scores of one query.

    The dense attention to each block, averaged over the group, is a distribution once it is divided
    by its sum over ``blocks``. The scores are raised to an exponent and divided likewise: the
    choice depends on their order alone. A mean of ``kernel_size`` keys holds at least that fraction
    of the logit of one key, so that the exponent is between 1 and ``kernel_size``, where the two
    are nearest. The loss is the divergence (Kullback and Leibler) of the second from the first,
    times the sum: how much attention the choice decides about.

    Args:
        query: ``[G, D]``, scaled.
        key: ``[S, D]``, the keys up to the query.
        log_scores: ``[Nkv]``, the logarithm of the block scores.
        blocks: The blocks to compare.
        config: Sparsity settings.

    Returns:
        float64 ``[]``. Its gradient flows through ``log_scores`` alone.
    """
    if not blocks:
        return log_scores.new_zeros(())
    size, scores = config.block_size, log_scores[blocks]
    attention = (query.double() @ key.double().T).softmax(-1).mean(0).detach()
    wanted = torch.stack([attention[n * size : (n + 1) * size].sum() for n in blocks])
    share = wanted / wanted.sum()
    exponent = best_exponent(share, scores.detach(), config.kernel_size)
    return (wanted * (share.log() - (exponent * scores).log_softmax(0))).sum()


def selection_loss(
    query: Tensor,
    key: Tensor,
    config: InfLLMConfig,
    *,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute the selection loss of every query and key/value head.

    The score of a block is taken as it ranks blocks: of windows of keys, the largest sum over heads
    of a window's weight; of a pooled query, its largest dot product with a key, times ``scale``,
    as the logarithm of the score. ``float8`` scores are taken before they are rounded.

    Args:
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, S, D]``.
        config: Sparsity settings. ``dense_len`` is not used.
        scale: Factor on the dot products; default ``1 / sqrt(D)``.
        attention_mask: As in ``find_sequences``.
        cu_seqlens: As in ``find_sequences``.

    Returns:
        float64 ``[B, Hkv, S]``, zero at padding and where no block is chosen by its score.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    config = dataclasses.replace(config, score_dtype="same")
    (B, Hkv, S), G = key.shape[:3], query.shape[1] // key.shape[1]
    losses = torch.zeros(B, Hkv, S, dtype=torch.float64)
    if attention_mask is None and cu_seqlens is None:
        attention_mask = torch.ones(B, S)  # every row is a sequence
    for b, tokens in find_sequences(S, attention_mask, cu_seqlens):
        for h in range(Hkv):
            q, k = query[b, h * G : (h + 1) * G, tokens], key[b, h, tokens]
            scores = score_blocks(q, k, config, scale=scale)
            log_scores = scores * scale if config.pool_queries else scores.log()
            for s in range(len(k)):
                blocks = choosable_blocks(scores[s], s // config.block_size, config)
                losses[b, h, tokens.start + s] = query_loss(
                    q[:, s] * scale, k[: s + 1], log_scores[s], blocks, config
                )
    return losses
