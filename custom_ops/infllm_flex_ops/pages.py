"""Rows of a key/value cache that lies in pages, in plain tensors.

A page holds the same number of tokens everywhere, and a row's block table names its pages in order.
A page also holds averages of windows of keys: each in the page of the window's last key, so that it
is valid exactly as long as the page is. The average of a window depends on the tokens up to its
last key only. Rows that share the pages of a prefix therefore share its windows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from infllm_flex_ops.sizes import ceil_div


class PagedRow(NamedTuple):
    """A row of a batch over pages.

    Attributes:
        queries: The row's queries, its last tokens, among those of the batch.
        length: Tokens of the row, the queries' own included.
        table: Its pages, int32 ``[max_pages]``.
    """

    queries: slice
    length: int
    table: Tensor

    @property
    def positions(self) -> range:
        """Positions of the queries."""
        return range(self.length - (self.queries.stop - self.queries.start), self.length)


def list_rows(
    block_table: Tensor, seq_lens: Tensor, query_start: Tensor, page_size: int
) -> Iterator[PagedRow]:
    """Iterate over the rows that have queries. Reads values: for definitions on the CPU.

    Args:
        block_table: int32 ``[B, max_pages]``.
        seq_lens: int32 ``[B]``.
        query_start: int32 ``[B + 1]``.
        page_size: Tokens of a page.

    Raises:
        ValueError: A row does not fit its block table.
    """
    bounds, room = query_start.tolist(), block_table.shape[1] * page_size
    for b, length in enumerate(seq_lens[: len(block_table)].tolist()):
        if length > room:
            raise ValueError(
                f"block_table must hold the pages of {length} tokens in row {b}, "
                f"got {block_table.shape[1]} pages of {page_size}"
            )
        if bounds[b] < bounds[b + 1]:
            yield PagedRow(slice(bounds[b], bounds[b + 1]), length, block_table[b])


def entries_per_page(page_size: int, stride: int) -> int:
    """Count the windows that end in a page; a page shorter than their step has room for one."""
    return ceil_div(page_size, stride)


def gather_tokens(pages: Tensor, table: Tensor, first: int, end: int) -> Tensor:
    """Copy a row's tokens ``first`` to ``end``, exclusive, of ``pages [P, H, page, D]``.

    Returns:
        ``[H, end - first, D]``.
    """
    page_size = pages.shape[2]
    return _gather(pages, table, torch.arange(first, end, device=pages.device), 1, page_size)


def gather_windows(
    pages: Tensor, table: Tensor, count: int, size: int, stride: int, page_size: int
) -> Tensor:
    """Copy the first ``count`` windows of a row.

    Args:
        pages: Averages of windows ``[P, H, entries, D]``.
        table: The row's pages, int32 ``[max_pages]``.
        count: Windows.
        size: Tokens of a window, a multiple of the step.
        stride: Step between windows, in tokens.
        page_size: Tokens of a page.

    Returns:
        ``[H, count, D]``.
    """
    last = last_tokens(range(count), size, stride, pages.device)
    return _gather(pages, table, last, stride, page_size)


def last_tokens(windows: range, size: int, stride: int, device: torch.device) -> Tensor:
    """Return the position of the last token of each window, int64."""
    return torch.arange(windows.start, windows.stop, device=device) * stride + size - 1


def locate(table: Tensor, last: Tensor, stride: int, page_size: int) -> tuple[Tensor, Tensor]:
    """Return page and entry of the windows, every ``stride`` tokens, whose last tokens are given.

    A token is a window of itself, with a stride of 1.
    """
    return table[last // page_size].long(), last % page_size // stride


def _gather(pages: Tensor, table: Tensor, last: Tensor, stride: int, page_size: int) -> Tensor:
    page, entry = locate(table, last, stride, page_size)
    return pages[page, :, entry].transpose(0, 1)
