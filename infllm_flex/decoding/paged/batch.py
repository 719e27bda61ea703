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
        """
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
        """
        bounds = list(host_query_start)
        counts = [end - start for start, end in itertools.pairwise(bounds)]
        long_rows = tuple(
            LongRow(row, bounds[row], bounds[row + 1], host_seq_lens[row])
            for row, count in enumerate(counts)
            if count > FEW_QUERIES
        )
        few = max((count for count in counts if count <= FEW_QUERIES), default=0)
        return cls(block_table, seq_lens, query_start, max(counts, default=0), few, long_rows)
