"""Ragged rows over a cache in pages, for kernels that also serve rows of one shape over one piece.

Such kernels take ``pages`` and ``PAGING``, both None for a cache in one piece. These helpers then
compile to what the kernels would be without them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.triton_common.tensor_args import View, view


class Pages(NamedTuple):
    """Where the rows of a batch lie.

    Attributes:
        table: Pages of each row, int32 ``[B, max_pages]``.
        row: Stride of the rows of the table.
        query_start: The first query of each row, int32 ``[B + 1]``.
    """

    table: Any
    row: int
    query_start: Any


class RowPages(NamedTuple):
    """The pages of one row, in a kernel.

    Attributes:
        table: Pointer to them.
        exists: Which of the entries exist that are looked up.
    """

    table: Any
    exists: Any


class Paging(NamedTuple):
    """Where the windows of a row lie in its pages, at compile time.

    Attributes:
        FIRST: Entry of the row's first window, counted over all of its entries.
        PER_PAGE: Entries of a page that are used.
        STEP: Pages of which one, the last, is used.
    """

    FIRST: int
    PER_PAGE: int
    STEP: int

    @classmethod
    def of_windows(cls, page_size: int, size: int, stride: int) -> "Paging":
        """Paging of windows of ``size`` tokens every ``stride``, in pages of ``page_size``."""
        return cls(size // stride - 1, max(1, page_size // stride), max(1, stride // page_size))


class CachedRows(NamedTuple):
    """The rows of a launch: of one shape over a cache in one piece, or ragged over pages.

    Attributes:
        q: View of the queries.
        pages: The ``Pages``; None for a cache in one piece.
        start: Slot of each row's first token; None for pages.
        end: One past the slot of each row's last token.
        B: Rows.
        n: Queries of a row, or of the row that has most.
        page_size: Tokens of a page; 0 for a cache in one piece.
    """

    q: View
    pages: Pages | None
    start: Tensor | None
    end: Tensor
    B: int
    n: int
    page_size: int

    @classmethod
    def in_one_piece(cls, q: Tensor, start: Tensor, end: Tensor) -> "CachedRows":
        """Group the rows of ``q [B, Hq, n, D]``."""
        return cls(view(q), None, start, end, q.shape[0], q.shape[2], 0)

    @classmethod
    def in_pages(
        cls,
        q: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start: Tensor,
        max_queries: int,
        page_size: int,
    ) -> "CachedRows":
        """Group the rows of ``q [T, Hq, D]``."""
        pages = Pages(block_table, block_table.stride(0), query_start)
        ragged = view(q.transpose(0, 1)[None])
        return cls(ragged, pages, None, seq_lens, len(block_table), max_queries, page_size)

    def pipeline(self, options: dict[str, int]) -> dict[str, int]:
        """Deepen the pipeline of a kernel's loop for a cache in pages."""
        return options if self.pages is None else deepen_pipeline(options)

    def windows(self, size: int, stride: int) -> "Paging | None":
        """How windows of ``size`` tokens every ``stride`` lie in pages."""
        return Paging.of_windows(self.page_size, size, stride) if self.page_size else None


def deepen_pipeline(options: dict[str, int]) -> dict[str, int]:
    """Deepen the pipeline of a kernel's loop over pages.

    There a load waits for the look-up of its page. Two more stages keep as many keys under way as
    without it.
    """
    num_stages = options["num_stages"]
    return options if num_stages == 1 else {**options, "num_stages": num_stages + 2}


@triton.jit
def row_length(start_ptr, end_ptr, b):
    """Tokens of a row; a row in pages starts with its first page and has no ``start_ptr``."""
    length = tl.load(end_ptr + b)
    if start_ptr is not None:
        length -= tl.load(start_ptr + b)
    return length.to(tl.int32)


@triton.jit
def count_queries(pages, b, n):
    """Queries of a row: ``n``, or those of a ragged row; none if these are more than ``n``."""
    num = n
    if pages is not None:
        first = tl.load(pages.query_start + b)
        num = tl.load(pages.query_start + b + 1) - first
        num = tl.where(num > n, 0, num)
    return num


@triton.jit
def is_missing(pages, i, num):
    """Whether a ragged row, of ``num`` queries, has no query ``i``."""
    missing = False
    if pages is not None:
        missing = i >= num
    return missing


@triton.jit
def view_queries(x, pages, b):
    """View queries, or what belongs to them; ragged ones from the first one of row ``b`` on."""
    ptr = x.ptr
    stride_b = x.b
    if pages is not None:
        ptr += tl.load(pages.query_start + b).to(tl.int64) * x.s
        stride_b = 0
    return View(ptr, stride_b, x.h, x.s, x.d)


@triton.jit
def view_keys(x, pages, b, h):
    """View one KV head's keys, ``b`` and ``h`` int64: of a row, or of all pages."""
    ptr = x.ptr
    if pages is None:
        ptr += b * x.b + h * x.h
    else:
        ptr += h * x.h
    return View(ptr, x.b, x.h, x.s, x.d)


@triton.jit
def entry_offset(x, index, row, PAGING: tl.constexpr):
    """Offsets of a row's windows ``index`` from the pointer of a view, int64.

    ``row`` is a ``RowPages`` whose ``exists`` has the shape of ``index``, or None.
    """
    if PAGING is None:
        offset = index.to(tl.int64) * x.s
    else:
        entry = (index + PAGING.FIRST).to(tl.uint32)  # whose division is a shift
        place = entry // PAGING.PER_PAGE * PAGING.STEP + (PAGING.STEP - 1)
        page = tl.load(row.table + place, mask=row.exists, other=0)
        offset = page.to(tl.int64) * x.b + (entry % PAGING.PER_PAGE).to(tl.int64) * x.s
    return offset


@triton.jit
def step_offset(x, first, index, count, table, PAGING: tl.constexpr, STEP: tl.constexpr):
    """Offsets of one step's windows, which follow each other, from the pointer of a view, int64.

    A step that lies in one page takes one look-up.

    Args:
        x: View of the windows.
        first: First window of the step, a multiple of ``STEP``.
        index: All its windows.
        count: Windows of the row; later ones are not looked up.
        table: Pointer to the pages of the row, or None.
        PAGING: The ``Paging`` of windows that do not overlap, or None.
        STEP: Windows of the step.
    """
    if PAGING is None:
        offset = index.to(tl.int64) * x.s
    elif PAGING.PER_PAGE % STEP == 0:
        page = tl.load(table + first // PAGING.PER_PAGE, mask=first < count, other=0)
        entry = first % PAGING.PER_PAGE + (index - first)
        offset = page.to(tl.int64) * x.b + entry.to(tl.int64) * x.s
    else:
        offset = entry_offset(x, index, RowPages(table, index < count), PAGING)
    return offset


@triton.jit
def token_offset(x, token, row, PAGE: tl.constexpr):
    """Offsets of a row's tokens from the pointer of a view, int64.

    ``row`` is a ``RowPages`` whose ``exists`` has the shape of ``token``; None where ``PAGE``, the
    tokens of a page, is 0.
    """
    if PAGE == 0:
        offset = token.to(tl.int64) * x.s
    else:
        page = tl.load(row.table + token // PAGE, mask=row.exists, other=0)
        offset = page.to(tl.int64) * x.b + (token % PAGE).to(tl.int64) * x.s
    return offset


@triton.jit
def locate_keys(
    first,
    key,
    last,
    table,
    PAGE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Page, int64, and entry of the keys of one step over a row's block.

    A block that lies in one page takes one look-up, and ``page`` is then a scalar.

    Args:
        first: First key of the step.
        key: All its keys; those behind the block are not used.
        last: Last key of the row that exists.
        table: Pointer to the pages of the row.
        PAGE: Keys of a page.
        BLOCK_SIZE: Keys of a block.
    """
    if PAGE % BLOCK_SIZE == 0:
        page = tl.load(table + first // PAGE, mask=(first >= 0) & (first <= last), other=0)
        entry = first % PAGE + (key - first)
    else:
        page = tl.load(table + key // PAGE, mask=(key >= 0) & (key <= last), other=0)
        entry = key % PAGE
    return page.to(tl.int64), entry
