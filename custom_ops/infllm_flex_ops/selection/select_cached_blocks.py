"""Choose the blocks of a key cache that the queries of a decode step attend to."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.selection.block_scores import (
    Rule,
    Windows,
    list_all,
    pick_best,
    pool_to_blocks,
    rank_blocks,
    weigh_windows,
)
from infllm_flex_ops.selection.select_blocks import tokens_per_tile


@define_operator()
def select_cached_blocks(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    start: Tensor,
    end: Tensor,
    kernel_size: int,
    kernel_stride: int,
    coarse_size: int,
    coarse_stride: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    num_selected: int,
    dense_len: int,
    width: int,
    scale: float,
) -> Tensor:
    """Pick the blocks of few queries per row, by the same rule as ``select_blocks``.

    A row's length is known on the device alone, so that one graph serves a whole generation. A
    query among a row's first ``dense_len - 1`` tokens lists all blocks up to its own, and attends
    densely by that: as it would if it came alone, whatever follows it in the same call.

    Args:
        q: Queries ``[B, Hq, n, D]``, the last ``n`` tokens of their rows; ``n`` is small.
        compressed: Compressed keys ``[B, Hkv, C, D]``, whose windows begin at a row's first token;
            as many count as the row's length makes whole. The rest may hold anything.
        coarse: Coarse keys ``[B, Hkv, C2, D]``, alike. The compressed keys again make the
            normaliser exact.
        start: Cache slot of each row's first token, int64 ``[B]``.
        end: One past the slot of each row's last token, int64 ``[B]``.
        kernel_size: Pooling window of the compressed keys, in tokens.
        kernel_stride: Step between their windows, in tokens.
        coarse_size: Pooling window of the coarse keys, in tokens.
        coarse_stride: Step between their windows, in tokens.
        block_size: Keys per block, a multiple of ``kernel_stride``.
        init_blocks: First blocks, always selected.
        local_blocks: Blocks before the query's own that are always selected, as its own is.
        num_selected: Budget in blocks; forced blocks count toward it.
        dense_len: A query up to which there are fewer tokens, its own included, lists every block.
        width: Slots per list: the budget, or the longest list of a dense query if that is more.
        scale: Factor on the dot products.

    Returns:
        Selected blocks, int32 ``[B, Hkv, n, width]``, counted from each row's first token,
        ascending, unused slots last as -1. A query that stands on padding has none. On the CPU a
        list has the very bits of what ``select_blocks`` chooses at that position.
    """
    B, _, n, _ = q.shape
    Hkv = compressed.shape[1]
    rule = Rule(
        Windows(kernel_size, kernel_stride),
        Windows(coarse_size, coarse_stride),
        block_size,
        init_blocks,
        local_blocks,
        scale,
    )
    selected = torch.full((B, Hkv, n, width), -1, dtype=torch.int32, device=q.device)
    for b, (first, last) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        length = last - first
        positions = range(length - n, length)
        fitting = max(dense_len - 1, num_selected * block_size)
        num_fit = min(n, max(0, fitting - positions[0]))  # that take every block
        if num_fit:
            selected[b, :, :num_fit] = list_all(positions[:num_fit], width, rule, q.device)
        if num_fit < n:
            rows, chosen = q[b, :, num_fit:], selected[b, :, num_fit:, :num_selected]
            select_for_row(rows, compressed[b], coarse[b], positions[num_fit:], rule, chosen)
    return selected


@select_cached_blocks.register_fake
def _(q: Tensor, compressed: Tensor, *rest: Any) -> Tensor:
    width = rest[-2]
    return q.new_empty(q.shape[0], compressed.shape[1], q.shape[2], width, dtype=torch.int32)


cuda_launcher(select_cached_blocks, "selection.kernels.select_cached_blocks")


def select_for_row(
    rows: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    positions: range,
    rule: Rule,
    out: Tensor,
) -> None:
    """Fill ``out [Hkv, n, K]`` for queries ``rows [Hq, n, D]`` of a sequence.

    Without coarse keys ``rows`` are pooled queries, one per KV head.

    Queries are cut where ``select_blocks`` cuts its tiles, and scored by products as wide as its
    own, so that the bits are the same.
    """
    tokens = tokens_per_tile(len(rows) // len(out))
    for start in range(positions[0] // tokens * tokens, positions[-1] + 1, tokens):
        at = slice(max(start - positions[0], 0), start + tokens - positions[0])
        scores = score_blocks(rows[:, at], compressed, coarse, positions[at], rule)
        out[:, at] = pick_best(scores, positions[at], out.shape[-1], rule)


def score_blocks(
    rows: Tensor, compressed: Tensor, coarse: Tensor | None, positions: range, rule: Rule
) -> Tensor:
    """Score blocks for queries ``rows [Hq, T, D]`` of one tile: ``[Hkv, T, num_blocks]``."""
    (Hq, T, D), Hkv = rows.shape, len(compressed)
    G = Hq // Hkv
    tokens = tokens_per_tile(G)
    last = positions[0] // tokens * tokens + tokens - 1
    tile = rows if T == 1 else rows.unflatten(0, (Hkv, G)).transpose(1, 2)
    tile = tile.reshape(Hkv, T * G, D).to(torch.promote_types(rows.dtype, torch.float32))
    tile = tile * rule.scale
    num_blocks = last // rule.block_size + 1
    logits = multiply(tile, compressed, rule.windows.scored_to(last))
    if coarse is None:
        return rank_blocks(logits, positions, num_blocks, rule)
    split = (Hkv, T, G, -1)
    logits = logits.reshape(split)
    coarse_logits = multiply(tile, coarse, rule.coarse_windows.scored_to(last)).reshape(split)
    weights = weigh_windows(logits, coarse_logits, positions, rule)
    return pool_to_blocks(weights, num_blocks, rule)


def multiply(tile: Tensor, keys: Tensor, C: int) -> Tensor:
    """Multiply ``tile [Hkv, M, D]`` with the first C of ``keys [Hkv, _, D]``: ``[Hkv, M, C]``.

    Each row has the bits that it has in a whole tile of `select_blocks`, if C is made of whole
    groups of columns.
    """
    _, M, D = tile.shape
    if keys.shape[1] < C:
        keys = F.pad(keys, (0, 0, 0, C - keys.shape[1]))
    keys = keys[:, :C].to(tile.dtype).mT
    rows = 4 if D <= 64 else 8 if D <= 128 else 16  # fewer take another path; see COLUMNS
    if M % rows:
        tile = F.pad(tile, (0, 0, 0, rows - M % rows))
    return torch.bmm(tile, keys)[:, :M]
