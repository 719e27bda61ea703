"""Find a tile's place among the sequences of a padded or packed batch."""

import triton
import triton.language as tl


@triton.jit
def locate_tile(
    documents_ptr,
    first,
    first_part,
    offset,
    PART: tl.constexpr,
    PART_ROWS: tl.constexpr,
):
    """Translate a tile's first row, counted in parts of ``PART_ROWS``, and read its document.

    A part of ``PART`` positions has rows for whole tiles, so that no tile holds two documents.

    Returns:
        The query that the first row is, the document's first position, which no table puts outside
        the positions up to here, the query after the document's or the part's last, and the budget.
    """
    part = first_part + first // PART_ROWS
    row = part * PART + first % PART_ROWS - offset
    begin = tl.minimum(tl.maximum(tl.load(documents_ptr + part * 3), 0), part * PART)
    end = tl.load(documents_ptr + part * 3 + 1)
    budget = tl.load(documents_ptr + part * 3 + 2)
    end_row = tl.minimum(end, part * PART + PART) - offset
    return row, begin, end_row, budget
