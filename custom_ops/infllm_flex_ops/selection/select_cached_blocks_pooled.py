"""Select the blocks of a key cache for a decode step, by one pooled query per group."""

from typing import Any

import torch
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.rows import check_room
from infllm_flex_ops.selection.pool_queries import pool_queries, round_to_float8
from infllm_flex_ops.selection.rotary_dims import scores_cache
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.selection.select_cached_blocks import list_full_queries, select_for_row


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
    """Select the blocks of few queries per row, by the same rule as ``select_blocks_pooled``.

    A row's length is known on the device alone, as in ``select_cached_blocks``.

    Args:
        q: Queries ``[B, Hq, n, D]``, the last ``n`` tokens of their rows, not yet pooled.
        compressed: For windows of one key in all dims the cache of keys ``[B, Hkv, S, D]``. Else
            compressed keys ``[B, Hkv, C, num_dims]`` as ``append_windows`` writes them: of all head
            dims or of the slowest ones, in which alone they and the queries are then multiplied.
            Their windows begin at a row's first token. Slots beyond a row's length may hold
            anything.
        start: Cache slot of each row's first token, int64 ``[B]``.
        end: One past the slot of each row's last token, int64 ``[B]``.
        window: Pooling window of the compressed keys, in tokens.
        block_size: Keys per block, a multiple of ``window``.
        init_blocks: First blocks, always selected.
        local_blocks: Blocks before the query's own that are always selected, as its own is.
        num_selected: Budget in blocks; forced blocks count toward it.
        dense_len: A query is dense if its row holds fewer tokens than this up to it, its own
            included; it lists every block.
        width: Slots per list: the budget, or the longest list of a dense query if that is longer.
        float8: Round pooled queries and compressed keys to e4m3 before they are multiplied. True
            for compressed keys in that dtype.

    Returns:
        Selected blocks, int32 ``[B, Hkv, n, width]``, counted from each row's first token,
        ascending, unused slots last as -1. A query on padding selects none. On the CPU a list
        equals bit for bit the list of ``select_blocks_pooled`` at that position.
    """
    rule = SelectionRule.from_pooled(window, block_size, init_blocks, local_blocks, num_selected)
    B, _, n, _ = q.shape
    Hkv = compressed.shape[1]
    selected = torch.full((B, Hkv, n, width), -1, dtype=torch.int32, device=q.device)
    accumulate = torch.promote_types(q.dtype, torch.float32)
    pooled = pool_queries(q, Hkv, float8, compressed.shape[3]).to(accumulate)
    is_cache = scores_cache(q, compressed, window)
    for b, (row_start, row_end) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        positions = range(row_end - row_start - n, row_end - row_start)
        num_full = list_full_queries(positions, rule, dense_len, selected[b])
        if num_full < n:
            if is_cache:
                check_room(b, row_end, compressed.shape[2])
            keys = compressed[b, :, row_start:row_end] if is_cache else compressed[b]
            keys = (round_to_float8(keys) if float8 else keys).to(accumulate)
            queries, out = pooled[b, :, num_full:], selected[b, :, num_full:, :num_selected]
            select_for_row(queries, keys, None, positions[num_full:], rule, 1.0, out)
    return selected


@select_cached_blocks_pooled.register_fake
def _(q: Tensor, compressed: Tensor, *rest: Any) -> Tensor:
    width = rest[-2]
    return q.new_empty(q.shape[0], compressed.shape[1], q.shape[2], width, dtype=torch.int32)


def _pack(*args: Any) -> tuple[Any, ...]:
    return *args[:4], SelectionRule.from_pooled(*args[4:9]), *args[9:]


cuda_launcher(select_cached_blocks_pooled, "selection.kernels.decode.launch_pooled", pack=_pack)
