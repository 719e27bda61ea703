"""Attend from many queries per row to all earlier tokens of a cache in pages, in every row."""

from typing import Any

import torch
from torch import Tensor

from infllm_flex_ops.block_attention.attend_paged_chunk import attend_paged_chunk
from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.pages import list_rows


@define_operator(mutates_args=("out",))
def attend_paged_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    first_row: int,
    num_rows: int,
    block_size: int,
    min_queries: int,
    max_queries: int,
    max_length: int,
    scale: float,
) -> None:
    """Attend densely and causally from the last tokens of each row, as ``attend_paged_chunk`` does.

    The result of a row is that of ``attend_paged_chunk`` with all blocks up to each query's own.
    Rows that are left out keep what ``out`` holds.

    Args:
        q: Queries ``[T, Hq, D]``, those of a row side by side.
        k: Pages of keys ``[P, Hkv, page, D]``, including those of the queries' own tokens. Slots
            beyond a row's length, or in no row's pages, may hold anything.
        v: Pages of values ``[P, Hkv, page, D]``.
        out: The results, ``[T, Hq, D]``, in the dtype of ``q``.
        block_table: Pages of each row in order, int32 ``[B, max_pages]``.
        seq_lens: Tokens of each row, int32 ``[B]``.
        query_start: Row b has the queries from ``query_start[b]`` to ``query_start[b + 1]``, its
            last tokens; int32 ``[B + 1]``.
        first_row: The first row that is looked at.
        num_rows: Rows that are looked at.
        block_size: Keys per block. It sizes the steps of the kernel.
        min_queries: Rows with fewer queries than this are left out.
        max_queries: The largest number of queries in a row that is not; it sizes the launch.
        max_length: Rows of more tokens than this are left out.
        scale: Factor on the dot products.

    Raises:
        ValueError: A row does not fit its block table. This is checked on the CPU only.
    """
    end = first_row + num_rows
    where = block_table[first_row:end], seq_lens[first_row:end], query_start[first_row : end + 1]
    for row in list_rows(*where, k.shape[2]):
        if len(row.positions) < min_queries or row.length > max_length:
            continue
        own = torch.arange(row.positions[0], row.length, device=q.device)[:, None] // block_size
        block = torch.arange((row.length - 1) // block_size + 1, device=q.device)
        selected = torch.where(block <= own, block, -1).int().expand(k.shape[1], -1, -1)
        out[row.queries] = attend_paged_chunk(
            q[row.queries], k, v, selected, row.table, row.length, block_size, scale
        )


@attend_paged_rows.register_fake
def _(*_: Any) -> None:
    return None


cuda_launcher(attend_paged_rows, "block_attention.kernels.attend_paged_rows")
