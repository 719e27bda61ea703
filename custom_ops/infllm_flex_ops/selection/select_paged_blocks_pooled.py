"""Select the blocks of a cache in pages for the newest tokens, by one pooled query per group."""

from typing import Any

import torch
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.pages import gather_windows, list_rows
from infllm_flex_ops.selection.pool_queries import pool_queries, round_to_float8
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.selection.select_cached_blocks import list_full_queries, select_for_row


@define_operator()
def select_paged_blocks_pooled(
    q: Tensor,
    compressed: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    window: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    num_selected: int,
    dense_len: int,
    width: int,
    max_queries: int,
    float8: bool,
) -> Tensor:
    """Select blocks for few queries per row, as ``select_cached_blocks_pooled`` does, from pages.

    Lengths are known on the device alone, so that one graph serves a whole generation.

    Args:
        q: Queries ``[T, Hq, D]``, those of a row side by side, not yet pooled.
        compressed: For windows of one key in all dims the pages of keys ``[P, Hkv, page, D]``. Else
            those of compressed keys ``[P, Hkv, page / window, num_dims]``, as
            ``append_paged_windows`` writes them: of all head dims or of the slowest ones, in which
            alone they and the queries are then multiplied. Slots beyond a row's length, or in no
            row's pages, may hold anything.
        block_table: Pages of each row in order, int32 ``[B, max_pages]``.
        seq_lens: Tokens of each row, int32 ``[B]``.
        query_start: Row b has the queries from ``query_start[b]`` to ``query_start[b + 1]``, its
            last tokens; int32 ``[B + 1]``.
        window: Pooling window of the compressed keys, in tokens.
        block_size: Keys per block, a multiple of ``window``.
        init_blocks: First blocks, always selected.
        local_blocks: Blocks before the query's own that are always selected, as its own is.
        num_selected: Budget in blocks; forced blocks count toward it.
        dense_len: A query is dense if its row holds fewer tokens than this up to it, its own
            included; it lists every block.
        width: Slots per list: the budget, or the longest list of a dense query if that is longer.
        max_queries: Rows with more queries than this are left out.
        float8: Round pooled queries and compressed keys to e4m3 before they are multiplied. True
            for compressed keys in that dtype.

    Returns:
        Selected blocks, int32 ``[Hkv, T, width]``, a token's heads side by side in memory, counted
        from each row's first token, ascending, unused slots last as -1. The lists of queries that
        no row has, and of rows that are left out, may hold anything.

    Raises:
        ValueError: A row does not fit its block table. This is checked on the CPU only.
    """
    rule = SelectionRule.from_pooled(window, block_size, init_blocks, local_blocks, num_selected)
    Hkv, page_size = compressed.shape[1], compressed.shape[2] * window
    selected = torch.full((len(q), Hkv, width), -1, dtype=torch.int32, device=q.device)
    selected = selected.transpose(0, 1)
    accumulate = torch.promote_types(q.dtype, torch.float32)
    queries = q.transpose(0, 1)[None]
    pooled = pool_queries(queries, Hkv, float8, compressed.shape[3])[0].to(accumulate)
    for row in list_rows(block_table, seq_lens, query_start, page_size):
        if len(row.positions) > max_queries:
            continue
        out = selected[:, row.queries]
        num_full = list_full_queries(row.positions, rule, dense_len, out)
        positions = row.positions[num_full:]
        if positions:
            count = rule.windows.num_visible(row.length - 1)
            keys = gather_windows(compressed, row.table, count, *rule.windows, page_size)
            keys = (round_to_float8(keys) if float8 else keys).to(accumulate)
            queries, lists = pooled[:, row.queries][:, num_full:], out[:, num_full:, :num_selected]
            select_for_row(queries, keys, None, positions, rule, 1.0, lists)
    return selected


@select_paged_blocks_pooled.register_fake
def _(q: Tensor, compressed: Tensor, *rest: Any) -> Tensor:
    width = rest[-3]
    lists = q.new_empty(q.shape[0], compressed.shape[1], width, dtype=torch.int32)
    return lists.transpose(0, 1)


def _pack(*args: Any) -> tuple[Any, ...]:
    return *args[:5], SelectionRule.from_pooled(*args[5:10]), *args[10:]


cuda_launcher(
    select_paged_blocks_pooled,
    "selection.kernels.decode.launch_pooled",
    "launch_paged",
    pack=_pack,
)
