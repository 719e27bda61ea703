"""Select the blocks of a cache in pages that the newest tokens of each row attend to."""

from typing import Any

import torch
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.pages import gather_windows, list_rows
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.selection.select_cached_blocks import list_full_queries, select_for_row


@define_operator()
def select_paged_blocks(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
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
    max_queries: int,
    scale: float,
) -> Tensor:
    """Select the blocks of few queries per row, as ``select_cached_blocks`` does, from pages.

    Lengths are known on the device alone, so that one graph serves a whole generation.

    Args:
        q: Queries ``[T, Hq, D]``, those of a row side by side.
        compressed: Pages of compressed keys ``[P, Hkv, page / kernel_stride, D]``, as
            ``append_paged_windows`` writes them. Pages that no row uses may hold anything.
        coarse: Pages of coarse keys ``[P, Hkv, ceil(page / coarse_stride), D]``. Given the
            compressed keys again, the normaliser is exact.
        block_table: Pages of each row in order, int32 ``[B, max_pages]``.
        seq_lens: Tokens of each row, int32 ``[B]``.
        query_start: Row b has the queries from ``query_start[b]`` to ``query_start[b + 1]``, its
            last tokens; int32 ``[B + 1]``.
        kernel_size: Pooling window of the compressed keys, in tokens.
        kernel_stride: Step between their windows, in tokens.
        coarse_size: Pooling window of the coarse keys, in tokens.
        coarse_stride: Step between their windows, in tokens.
        block_size: Keys per block, a multiple of ``kernel_stride``.
        init_blocks: First blocks, always selected.
        local_blocks: Blocks before the query's own that are always selected, as its own is.
        num_selected: Budget in blocks; forced blocks count toward it.
        dense_len: A query is dense if its row holds fewer tokens than this up to it, its own
            included; it lists every block.
        width: Slots per list: the budget, or the longest list of a dense query if that is longer.
        max_queries: Rows with more queries than this are left out.
        scale: Factor on the dot products.

    Returns:
        Selected blocks, int32 ``[Hkv, T, width]``, a token's heads side by side in memory, counted
        from each row's first token, ascending, unused slots last as -1. The lists of queries that
        no row has, and of rows that are left out, may hold anything.

    Raises:
        ValueError: A row does not fit its block table. This is checked on the CPU only.
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
    page_size = compressed.shape[2] * kernel_stride
    shape = (q.shape[0], compressed.shape[1], width)
    selected = torch.full(shape, -1, dtype=torch.int32, device=q.device).transpose(0, 1)
    for row in list_rows(block_table, seq_lens, query_start, page_size):
        if len(row.positions) > max_queries:
            continue
        out = selected[:, row.queries]
        num_full = list_full_queries(row.positions, rule, dense_len, out)
        positions = row.positions[num_full:]
        if positions:
            compressed_keys, coarse_keys = (
                gather_windows(pages, row.table, kind.num_visible(row.length - 1), *kind, page_size)
                for pages, kind in ((compressed, rule.windows), (coarse, rule.coarse_windows))
            )
            queries = q[row.queries].transpose(0, 1)[:, num_full:]
            lists = out[:, num_full:, :num_selected]
            select_for_row(queries, compressed_keys, coarse_keys, positions, rule, scale, lists)
    return selected


@select_paged_blocks.register_fake
def _(q: Tensor, compressed: Tensor, *rest: Any) -> Tensor:
    width = rest[-3]
    lists = q.new_empty(q.shape[0], compressed.shape[1], width, dtype=torch.int32)
    return lists.transpose(0, 1)


def _pack(*args: Any) -> tuple[Any, ...]:
    rule, others = SelectionRule.split(args[6:])
    return *args[:6], rule, *others


cuda_launcher(select_paged_blocks, "selection.kernels.decode.launch", "launch_paged", pack=_pack)
