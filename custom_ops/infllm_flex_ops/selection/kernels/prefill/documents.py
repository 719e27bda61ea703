"""Find the place of a tile's rows among the sequences of a padded or packed batch."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class TileRows(NamedTuple):
    """The rows of a tile, in a kernel.

    Attributes:
        start: Query that the first row is.
        end: Query after the last one of the sequence, the part or the chunk.
        q_offset: Position of the first query in its own sequence.
        seq_start: Position of the sequence's first token.
        budget: Budget of the sequence, in blocks.
    """

    start: Any
    end: Any
    q_offset: Any
    seq_start: Any
    budget: Any


@triton.jit
def locate_rows(documents_ptr, row, row_end, q_offset, part_start, budget, PART: tl.constexpr):
    """Locate a tile whose first row is ``row``.

    With documents, rows are counted in parts of ``PART.ROWS``, from the part ``part_start`` on. A
    part of ``PART.SIZE`` positions has rows for whole tiles, so that no tile holds two documents.
    ``documents_ptr`` points at the parts of the tile's batch row.
    """
    seq_start = 0
    if PART.SIZE > 0:
        part = part_start + row // PART.ROWS
        row = part * PART.SIZE + row % PART.ROWS - q_offset
        # Clamp, so that a corrupt table cannot lead out of the positions up to here.
        seq_start = tl.minimum(tl.maximum(tl.load(documents_ptr + part * 3), 0), part * PART.SIZE)
        seq_end = tl.load(documents_ptr + part * 3 + 1)
        budget = tl.load(documents_ptr + part * 3 + 2)
        row_end = tl.minimum(seq_end, part * PART.SIZE + PART.SIZE) - q_offset
        q_offset -= seq_start
    return TileRows(row, row_end, q_offset, seq_start, budget)
