"""The definition of InfLLM-V2 in float64, slow and plain, by which everything else is tested.

It follows the rule in docs/architecture.md, one query at a time, and shares no code with the
operators it judges. For tests and for readers; use small sizes.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from infllm_flex.config import InfLLMConfig


def compress_keys(key: Tensor, size: int, stride: int) -> Tensor:
    """Average whole windows of ``key [S, D]``: ``[C, D]``."""
    key = key.double()
    windows = [key[j : j + size].mean(0) for j in range(0, len(key) - size + 1, stride)]
    return torch.stack(windows) if windows else key.new_zeros(0, key.shape[1])


def score_blocks(query: Tensor, key: Tensor, config: InfLLMConfig, *, scale: float) -> Tensor:
    """Score the blocks of one sequence and one KV head for every query.

    Args:
        query: ``[G, Sq, D]``, the group's queries, the last ``Sq`` positions.
        key: ``[Skv, D]``.
        config: Sparsity settings.
        scale: Factor on the dot products.

    Returns:
        float64 ``[Sq, Nkv]``; -inf where no window of the block is visible. Differentiable, unless
        in float8.
    """
    if config.pool_queries:
        return _score_pooled(query, key, config)
    G, Sq, _ = query.shape
    Skv = len(key)
    size, stride = config.kernel_size, config.kernel_stride
    compressed = compress_keys(key, size, stride)
    coarse = compress_keys(key, 4 * size, 4 * stride)
    scores = torch.full((Sq, math.ceil(Skv / config.block_size)), -torch.inf, dtype=torch.float64)
    for s in range(Sq):
        p = Skv - Sq + s
        visible = [j for j in range(len(compressed)) if stride * j + size - 1 <= p]
        coarse_visible = [j for j in range(len(coarse)) if 4 * stride * j + 4 * size - 1 <= p]
        if not visible:
            continue
        weight = torch.zeros(len(visible), dtype=torch.float64)
        for g in range(G):
            q = query[g, s].double() * scale
            logits = compressed[visible] @ q
            use_coarse = config.lse == "coarse" and coarse_visible
            lse = (coarse[coarse_visible] @ q if use_coarse else logits).logsumexp(0)
            weight += (logits - lse).exp()
        for block in range(scores.shape[1]):
            start, end = block * config.block_size, (block + 1) * config.block_size
            inside = [n for n, j in enumerate(visible) if start - size < stride * j < end]
            if inside:
                scores[s, block] = weight[inside].max()
    return scores


def _score_pooled(query: Tensor, key: Tensor, config: InfLLMConfig) -> Tensor:
    """Score blocks by the group's mean query: its largest dot product with a window of a block."""
    size, block_size = config.kernel_size, config.block_size
    if config.score_dims:
        query, key = (_lowest_frequencies(x, config.score_dims) for x in (query, key))
    pooled, compressed = query.double().mean(0), compress_keys(key, size, size)
    if config.score_dtype == "float8":
        exponent = torch.frexp(pooled.abs().amax(-1, keepdim=True)).exponent
        pooled, compressed = _as_float8(pooled * 2.0 ** (8 - exponent)), _as_float8(compressed)
    Sq, Skv = len(pooled), len(key)
    scores = torch.full((Sq, math.ceil(Skv / block_size)), -torch.inf, dtype=torch.float64)
    for s in range(Sq):
        visible = (Skv - Sq + s + 1) // size
        logits = compressed[:visible] @ pooled[s]
        logits = logits.masked_fill(logits.isnan(), -torch.inf)
        for block, windows in enumerate(logits.split(block_size // size)):
            scores[s, block] = windows.max() if len(windows) else -torch.inf
    return scores


def _lowest_frequencies(x: Tensor, num_dims: int) -> Tensor:
    """Take the dims of ``x [..., D]`` that turn slowest, where dim i turns with dim i + D / 2."""
    half = x.shape[-1] // 2
    pairs = range(half - num_dims // 2, half)  # the frequency falls from pair to pair
    return x[..., [*pairs, *(half + i for i in pairs)]]


def _as_float8(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).double()


def is_forced(block: int, own: int, config: InfLLMConfig) -> bool:
    """Whether ``block`` is an init, local or own block of a query whose own block is ``own``."""
    return block <= own and (block < config.init_blocks or block >= own - config.local_blocks)


def select_blocks(query: Tensor, key: Tensor, config: InfLLMConfig, *, scale: float) -> Tensor:
    """Select the blocks of every query.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        config: Sparsity settings.
        scale: Factor on the dot products.

    Returns:
        int32 ``[B, Hkv, Sq, K]``, ascending, -1 for unused slots.
    """
    (B, Hq, Sq, _), (Hkv, Skv) = query.shape, key.shape[1:3]
    G = Hq // Hkv
    K = min(config.num_selected, math.ceil(Skv / config.block_size))
    selected = torch.full((B, Hkv, Sq, K), -1, dtype=torch.int32)
    for b in range(B):
        for h in range(Hkv):
            group = query[b, h * G : (h + 1) * G]
            scores = score_blocks(group, key[b, h], config, scale=scale).tolist()
            for s in range(Sq):
                own = (Skv - Sq + s) // config.block_size
                ranked = sorted(
                    range(own + 1), key=lambda n: (not is_forced(n, own, config), -scores[s][n], n)
                )
                best = sorted(ranked[:K])
                selected[b, h, s, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return selected


def attention_mask(selected: Tensor, block_size: int, kv_len: int) -> Tensor:
    """Expand a selection to a causal mask over keys: bool ``[B, Hkv, Sq, Skv]``."""
    Sq = selected.shape[2]
    key = torch.arange(kv_len, device="cpu")
    is_selected = (selected[..., None].cpu() == key // block_size).any(-2)
    return is_selected & (key <= key[kv_len - Sq :, None])


def switched_mask(selected: Tensor, config: InfLLMConfig, kv_len: int) -> Tensor:
    """Make the causal mask of a sequence: its dense queries see all keys, the others their blocks.

    The length that decides is that of the sequence, or, by position, that up to the query.

    Args:
        selected: int32 ``[B, Hkv, Sq, K]``; what it holds for dense queries has no effect.
        config: Sparsity settings.
        kv_len: Keys in the sequence.

    Returns:
        bool ``[B, Hkv, Sq, Skv]``.
    """
    Sq = selected.shape[2]
    position = torch.arange(kv_len - Sq, kv_len)[:, None]
    causal = torch.arange(kv_len) <= position
    length = position + 1 if config.dense_by == "position" else torch.tensor(kv_len)
    sparse = attention_mask(selected, config.block_size, kv_len)
    return torch.where(length < config.dense_len, causal, sparse)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float
) -> Tensor:
    """Softmax attention over the keys that ``mask [B, Hkv, Sq, Skv]`` allows, in float64.

    Differentiable. A query that may see no key gives 0.
    """
    G = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double(), value.double()
    k, v, mask = (x.repeat_interleave(G, dim=1) for x in (k, v, mask.to(query.device)))
    logits = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    empty = ~mask.any(-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) @ v


def attention(
    query: Tensor, key: Tensor, value: Tensor, config: InfLLMConfig, *, scale: float | None = None
) -> Tensor:
    """Attend as ``infllm_attention`` does: densely if short, else to the selected blocks.

    Args:
        query: ``[B, Hq, Sq, D]``, the last ``Sq`` positions.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, D]``.
        config: Sparsity settings.
        scale: Factor on the dot products; default ``1 / sqrt(D)``.

    Returns:
        float64 ``[B, Hq, Sq, D]``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    Sq, Skv = query.shape[2], key.shape[2]
    if Skv < config.dense_len:
        selected = torch.full((*key.shape[:2], Sq, 0), -1, dtype=torch.int32)
    else:
        with torch.no_grad():
            selected = select_blocks(query, key, config, scale=scale)
    mask = switched_mask(selected, config, Skv)
    return masked_attention(query, key, value, mask, scale=scale)


def find_sequences(
    length: int, attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> list[tuple[int, slice]]:
    """List the batch row and the tokens of every sequence that is not empty.

    Args:
        length: Tokens per row.
        attention_mask: ``[B, length]`` of a padded batch, one run of ones per row.
        cu_seqlens: ``[N + 1]``, the bounds of the documents of one row.
    """
    if attention_mask is not None:
        rows = [row.nonzero().flatten().tolist() for row in attention_mask]
        return [(b, slice(at[0], at[-1] + 1)) for b, at in enumerate(rows) if at]
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    return [(0, slice(a, b)) for a, b in itertools.pairwise(bounds) if a < b]


def batch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: InfLLMConfig,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attend within each sequence of a padded or packed batch as if it were alone.

    Arguments and result are those of ``attention`` and ``find_sequences``; zero at padding.
    """
    out = torch.zeros_like(query, dtype=torch.float64)
    before = key.shape[2] - query.shape[2]
    for b, tokens in find_sequences(key.shape[2], attention_mask, cu_seqlens):
        rows = slice(max(tokens.start - before, 0), max(tokens.stop - before, 0))
        if rows.start < rows.stop:
            alone = query[b, None, :, rows], key[b, None, :, tokens], value[b, None, :, tokens]
            out[b, :, rows] = attention(*alone, config)[0]
    return out
