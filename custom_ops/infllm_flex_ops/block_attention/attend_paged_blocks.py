"""Attend from the newest tokens of each row to their blocks of a cache in pages."""

from typing import Any

from torch import Tensor

from infllm_flex_ops.block_attention.attend_cached_blocks import attend_to_lists, visible_lists
from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.pages import gather_tokens, list_rows
from infllm_flex_ops.transforms import refuse_gradients


@define_operator()
def attend_paged_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    block_size: int,
    max_queries: int,
    scale: float,
) -> Tensor:
    """Attend from few queries per row, as ``attend_cached_blocks`` does, to keys in pages.

    Only the listed blocks are read. Not differentiable.

    Args:
        q: Queries ``[T, Hq, D]``, those of a row side by side.
        k: Pages of keys ``[P, Hkv, page, D]``, including those of the queries' own tokens. Slots
            beyond a row's length, or in no row's pages, may hold anything.
        v: Pages of values ``[P, Hkv, page, D]``.
        selected: Blocks, int32 ``[Hkv, T, W]``, ascending, -1 for unused slots. Block 0 begins at
            the row's first token.
        block_table: Pages of each row in order, int32 ``[B, max_pages]``.
        seq_lens: Tokens of each row, int32 ``[B]``.
        query_start: Row b has the queries from ``query_start[b]`` to ``query_start[b + 1]``, its
            last tokens; int32 ``[B + 1]``.
        block_size: Keys per block.
        max_queries: Rows with more queries than this are left out.
        scale: Factor on the dot products.

    Returns:
        ``[T, Hq, D]`` in the dtype of ``q``; 0 for a query without blocks. The results of queries
        that no row has, and of rows that are left out, may hold anything.

    Raises:
        ValueError: A row does not fit its block table. This is checked on the CPU only.
    """
    out = q.new_zeros(q.shape)
    for row in list_rows(block_table, seq_lens, query_start, k.shape[2]):
        if len(row.positions) > max_queries:
            continue
        keys, values = (gather_tokens(x, row.table, 0, row.length) for x in (k, v))
        for i, position in enumerate(row.positions, start=row.queries.start):
            lists = visible_lists(selected[:, i].tolist(), position, block_size)
            out[i] = attend_to_lists(q[i], keys, values, lists, 0, block_size, scale)
    return out


@attend_paged_blocks.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


cuda_launcher(attend_paged_blocks, "block_attention.kernels.attend_cached_blocks", "launch_paged")


refuse_gradients(
    attend_paged_blocks,
    "attend_paged_blocks is not differentiable: to train, attend without a cache",
)
