"""Select the blocks of a key cache that the queries of a decode step attend to."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.selection.block_scores import (
    list_all_blocks,
    pool_to_blocks,
    rank_blocks,
    score_windows,
    topk_blocks,
)
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.selection.select_in_tiles import tokens_per_tile


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
    """Select the blocks of few queries per row, by the same rule as ``select_blocks``.

    A row's length is known on the device alone, so that one graph serves a whole generation. A
    query among a row's first ``dense_len - 1`` tokens is dense: it lists all blocks up to its own.
    Whether it is dense does not depend on the tokens that follow it in the same call.

    Args:
        q: Queries ``[B, Hq, n, D]``, the last ``n`` tokens of their rows; ``n`` is small.
        compressed: Compressed keys ``[B, Hkv, C, D]``, whose windows begin at a row's first token.
            The windows that lie wholly within the row count; the rest may hold anything.
        coarse: Coarse keys ``[B, Hkv, C2, D]`` in the same layout. Given the compressed keys again,
            the normaliser is exact.
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
        dense_len: A query is dense if its row holds fewer tokens than this up to it, its own
            included.
        width: Slots per list: the budget, or the longest list of a dense query if that is longer.
        scale: Factor on the dot products.

    Returns:
        Selected blocks, int32 ``[B, Hkv, n, width]``, counted from each row's first token,
        ascending, unused slots last as -1. A query on padding selects none. On the CPU a list
        equals bit for bit the list of ``select_blocks`` at that position.
    """
    rule = SelectionRule(
        kernel_size,
        kernel_stride,
        coarse_size,
        coarse_stride,
        block_size,
        init_blocks,
        local_blocks,
        num_selected,
    )
    B, _, n, _ = q.shape
    Hkv = compressed.shape[1]
    selected = torch.full((B, Hkv, n, width), -1, dtype=torch.int32, device=q.device)
    for b, (row_start, row_end) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        positions = range(row_end - row_start - n, row_end - row_start)
        num_full = list_full_queries(positions, rule, dense_len, selected[b])
        if num_full < n:
            queries, out = q[b, :, num_full:], selected[b, :, num_full:, :num_selected]
            positions = positions[num_full:]
            select_for_row(queries, compressed[b], coarse[b], positions, rule, scale, out)
    return selected


@select_cached_blocks.register_fake
def _(q: Tensor, compressed: Tensor, *rest: Any) -> Tensor:
    width = rest[-2]
    return q.new_empty(q.shape[0], compressed.shape[1], q.shape[2], width, dtype=torch.int32)


def _pack(*args: Any) -> tuple[Any, ...]:
    rule, others = SelectionRule.split(args[5:])
    return *args[:5], rule, *others


cuda_launcher(select_cached_blocks, "selection.kernels.decode.launch", pack=_pack)


def list_full_queries(positions: range, rule: SelectionRule, dense_len: int, out: Tensor) -> int:
    """Write the lists of the first queries, which hold every block, to ``out [Hkv, n, width]``.

    These queries are dense, or all blocks up to their own fit the budget.

    Returns:
        The number of these queries.

    Raises:
        ValueError: The lists have too few slots.
    """
    end = max(dense_len - 1, rule.budget_tokens)
    num_full = min(len(positions), max(0, end - positions[0]))
    longest = positions[num_full - 1] // rule.block_size + 1 if num_full else 0
    if num_full < len(positions):
        longest = max(longest, rule.num_selected)
    if longest > out.shape[-1]:
        raise ValueError(
            f"width must be {longest} or more, the longest list, got {out.shape[-1]}: the capacity "
            f"must be that of the longest row"
        )
    if num_full:
        lists = list_all_blocks(positions[:num_full], out.shape[-1], rule, out.device)
        out[:, :num_full] = lists
    return num_full


def select_for_row(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    positions: range,
    rule: SelectionRule,
    scale: float,
    out: Tensor,
) -> None:
    """Fill ``out [Hkv, n, K]`` for the queries of a row.

    Queries are cut where ``select_blocks`` cuts its tiles, and scored by products as wide as its
    own, so that the bits are the same.

    Args:
        q: ``[Hq, n, D]``; without coarse keys pooled queries, one per KV head.
        compressed: ``[Hkv, C, D]``.
        coarse: ``[Hkv, C2, D]``, or None.
        positions: Positions of the queries.
        rule: Settings.
        scale: Factor on the dot products.
        out: The lists.
    """
    tokens = tokens_per_tile(len(q) // len(out))
    for start in range(positions[0] // tokens * tokens, positions[-1] + 1, tokens):
        at = slice(max(start - positions[0], 0), start + tokens - positions[0])
        scores = score_blocks(q[:, at], compressed, coarse, positions[at], rule, scale)
        out[:, at] = topk_blocks(scores, positions[at], out.shape[-1], rule)


def score_blocks(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    positions: range,
    rule: SelectionRule,
    scale: float,
) -> Tensor:
    """Score blocks for queries ``q [Hq, T, D]`` of one tile: ``[Hkv, T, num_blocks]``."""
    (Hq, T, D), Hkv = q.shape, len(compressed)
    G = Hq // Hkv
    tokens = tokens_per_tile(G)
    last = positions[0] // tokens * tokens + tokens - 1
    tile = q if T == 1 else q.unflatten(0, (Hkv, G)).transpose(1, 2)
    tile = tile.reshape(Hkv, T * G, D).to(torch.promote_types(q.dtype, torch.float32))
    tile = tile * scale
    num_blocks = last // rule.block_size + 1
    logits = multiply(tile, compressed, rule.windows.num_scored(last))
    if coarse is None:
        return rank_blocks(logits, positions, num_blocks, rule)
    split = (Hkv, T, G, -1)
    logits = logits.reshape(split)
    coarse_logits = multiply(tile, coarse, rule.coarse_windows.num_scored(last)).reshape(split)
    weights = score_windows(logits, coarse_logits, positions, rule)
    return pool_to_blocks(weights, num_blocks, rule)


def multiply(tile: Tensor, keys: Tensor, C: int) -> Tensor:
    """Multiply ``tile [Hkv, M, D]`` with the first C of ``keys [Hkv, _, D]``: ``[Hkv, M, C]``.

    Each row has the bits that it has in a whole tile of ``select_blocks``, if C consists of whole
    groups of ``COLUMNS``.
    """
    _, M, D = tile.shape
    if keys.shape[1] < C:
        keys = F.pad(keys, (0, 0, 0, C - keys.shape[1]))
    keys = keys[:, :C].to(tile.dtype).mT
    rows = 4 if D <= 64 else 8 if D <= 128 else 16  # fewer rows take another path; see COLUMNS
    if M % rows:
        tile = F.pad(tile, (0, 0, 0, rows - M % rows))
    return torch.bmm(tile, keys)[:, :M]
