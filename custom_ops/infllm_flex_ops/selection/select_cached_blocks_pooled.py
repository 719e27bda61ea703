"""Choose the blocks of a key cache for a decode step, by one pooled query per group."""

from typing import Any

import torch
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.selection.block_scores import Rule, Windows, list_all
from infllm_flex_ops.selection.pool_queries import pool_queries, round_to_float8
from infllm_flex_ops.selection.select_cached_blocks import select_for_row


@define_operator()
def select_cached_blocks_pooled(
    q: Tensor,
    compressed: Tensor,
    start: Tensor,
    end: Tensor,
    window: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    num_selected: int,
    dense_len: int,
    width: int,
    float8: bool,
) -> Tensor:
    """Pick the blocks of few queries per row, by the same rule as ``select_blocks_pooled``.

    A row's length is known on the device alone, as in ``select_cached_blocks``.

    Args:
        q: Queries ``[B, Hq, n, D]``, the last ``n`` tokens of their rows, not yet pooled.
        compressed: For windows of one key the cache of keys ``[B, Hkv, S, D]``; for longer ones the
            compressed keys ``[B, Hkv, C, D]``, whose windows begin at a row's first token. What
            lies beyond a row's length may hold anything.
        start: Cache slot of each row's first token, int64 ``[B]``.
        end: One past the slot of each row's last token, int64 ``[B]``.
        window: Pooling window of the compressed keys, in tokens.
        block_size: Keys per block, a multiple of ``window``.
        init_blocks: First blocks, always selected.
        local_blocks: Blocks before the query's own that are always selected, as its own is.
        num_selected: Budget in blocks; forced blocks count toward it.
        dense_len: A query up to which there are fewer tokens, its own included, lists every block.
        width: Slots per list: the budget, or the longest list of a dense query if that is more.
        float8: Round pooled queries and compressed keys to e4m3 before they are multiplied.

    Returns:
        Selected blocks, int32 ``[B, Hkv, n, width]``, counted from each row's first token,
        ascending, unused slots last as -1. A query that stands on padding has none. On the CPU a
        list has the very bits of what ``select_blocks_pooled`` chooses at that position.
    """
    B, _, n, _ = q.shape
    Hkv = compressed.shape[1]
    windows = Windows(window, window)
    rule = Rule(windows, windows, block_size, init_blocks, local_blocks, 1.0)
    selected = torch.full((B, Hkv, n, width), -1, dtype=torch.int32, device=q.device)
    pooled = pool_queries(q, Hkv, float8)
    accumulate = torch.promote_types(q.dtype, torch.float32)
    for b, (first, last) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        positions = range(last - first - n, last - first)
        fitting = max(dense_len - 1, num_selected * block_size)
        num_fit = min(n, max(0, fitting - positions[0]))  # that take every block
        if num_fit:
            selected[b, :, :num_fit] = list_all(positions[:num_fit], width, rule, q.device)
        if num_fit < n:
            keys = compressed[b, :, first:last] if window == 1 else compressed[b]
            keys = round_to_float8(keys) if float8 else keys
            rows, chosen = pooled[b, :, num_fit:], selected[b, :, num_fit:, :num_selected]
            rows, keys = rows.to(accumulate), keys.to(accumulate)
            select_for_row(rows, keys, None, positions[num_fit:], rule, chosen)
    return selected


@select_cached_blocks_pooled.register_fake
def _(q: Tensor, compressed: Tensor, *rest: Any) -> Tensor:
    width = rest[-2]
    return q.new_empty(q.shape[0], compressed.shape[1], q.shape[2], width, dtype=torch.int32)


cuda_launcher(select_cached_blocks_pooled, "selection.kernels.select_cached_blocks.pooled")
