"""The rows of one step over a cache in pages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

# Up to here a row's queries are attended to one by one, each reading its own blocks; more of them
# share blocks in tiles.
FEW_QUERIES = 16


class LongRow(NamedTuple):
    """A row with many queries, its numbers on the host: ``[start, end)`` among the queries."""

    row: int
    start: int
    end: int
    length: int


class PagedBatch(NamedTuple):
    """The rows of one step, the same for all layers. Rows with few and with many queries mix.

    Attributes:
        block_table: Pages of each row in order, int32 ``[B, max_pages]``. Entries behind a row's
            last page may hold anything.
        seq_lens: Tokens of each row, the newest included, int32 ``[B]``; 0 for a row of padding.
        query_start: The queries of row b are its last tokens, those from ``query_start[b]`` to
            ``query_start[b + 1]``; int32 ``[B + 1]``.
        max_new: The largest number of queries in a row.
        max_few: The largest number of queries in a row that has few of them; 0 if none has.
        long_rows: The rows that have many.
    """

    block_table: Tensor
    seq_lens: Tensor
    query_start: Tensor
    max_new: int
    max_few: int
    long_rows: tuple[LongRow, ...] = ()

    @classmethod
    def of_steps(
        cls, block_table: Tensor, seq_lens: Tensor, query_start: Tensor, max_queries: int
    ) -> PagedBatch:
        """Make a batch of rows that all have few queries, without reading any value.

        A CUDA graph that was captured with it serves other rows by other values of the tensors.

        Args:
            block_table: int32 ``[B, max_pages]``.
            seq_lens: int32 ``[B]``.
            query_start: int32 ``[B + 1]``.
            max_queries: The largest number of queries in a row.

        Raises:
            ValueError: The tensors do not hold as many rows as ``block_table``.
        """
        _check_rows(block_table, seq_lens, query_start)
        return cls(block_table, seq_lens, query_start, max_queries, max_queries)

    @classmethod
    def of_rows(
        cls,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start: Tensor,
        host_seq_lens: Sequence[int],
        host_query_start: Sequence[int],
    ) -> PagedBatch:
        """Make a batch of any rows.

        Args:
            block_table: int32 ``[B, max_pages]``.
            seq_lens: int32 ``[B]``.
            query_start: int32 ``[B + 1]``.
            host_seq_lens: The values of ``seq_lens``; only those of rows with many queries count.
            host_query_start: The values of ``query_start``.

        Raises:
            ValueError: The tensors do not hold as many rows as ``block_table``, the bounds descend,
                or a row with many queries has fewer tokens than those.
        """
        _check_rows(block_table, seq_lens, query_start)
        bounds = list(host_query_start)
        counts = [end - start for start, end in itertools.pairwise(bounds)]
        for row, count in enumerate(counts):
            if count and row >= len(block_table):
                raise ValueError(
                    f"block_table must hold all rows that have queries, got {len(block_table)} "
                    f"rows and {count} queries in row {row}"
                )
            if count < 0:
                raise ValueError(
                    f"query_start must ascend, got {bounds[row : row + 2]} in row {row}"
                )
            if count > FEW_QUERIES and count > host_seq_lens[row]:
                raise ValueError(
                    f"a row must hold the tokens of its queries, got {host_seq_lens[row]} tokens "
                    f"and {count} queries in row {row}"
                )
        long_rows = tuple(
            LongRow(row, bounds[row], bounds[row + 1], host_seq_lens[row])
            for row, count in enumerate(counts)
            if count > FEW_QUERIES
        )
        few = max((count for count in counts if count <= FEW_QUERIES), default=0)
        return cls(block_table, seq_lens, query_start, max(counts, default=0), few, long_rows)


def _check_rows(block_table: Tensor, seq_lens: Tensor, query_start: Tensor) -> None:
    shapes = block_table.dim(), seq_lens.dim(), query_start.dim()
    rows = len(block_table)
    if shapes != (2, 1, 1) or len(seq_lens) < rows or len(query_start) <= rows:
        raise ValueError(
            "block_table, seq_lens and query_start must be [B, max_pages], [B] and [B + 1], got "
            f"{list(block_table.shape)}, {list(seq_lens.shape)} and {list(query_start.shape)}"
        )
