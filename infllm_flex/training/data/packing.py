"""Pack documents into rows of one length, with few splits and almost no padding."""

from __future__ import annotations

import bisect
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Part of a document.

    Attributes:
        start: Index of its first token in the text.
        length: Number of tokens.
        continues: Whether the next token of the text belongs to the same document.
    """

    start: int
    length: int
    continues: bool


def pack(pieces: list[Piece], length: int) -> list[list[Piece]]:
    """Pack pieces into the smallest possible number of rows.

    Best fit decreasing: from the longest piece on, each goes into the row where it leaves the
    smallest gap. A piece that fits nowhere is split, and its first part fills the largest gap. The
    padding of all rows together is less than one row.

    Args:
        pieces: Pieces of at most ``length`` tokens each.
        length: Tokens per row.

    Returns:
        ``ceil(total / length)`` rows, each of at most ``length`` tokens.
    """
    total = sum(piece.length for piece in pieces)
    rows: list[list[Piece]] = [[] for _ in range(-(-total // length))]
    gaps = [(length, row) for row in range(len(rows))]  # ascending
    for piece in sorted(pieces, key=lambda p: (-p.length, p.start)):
        rest = piece
        while (place := bisect.bisect_left(gaps, (rest.length, 0))) == len(gaps):
            gap, row = gaps.pop()
            rows[row].append(Piece(rest.start, gap, True))
            rest = Piece(rest.start + gap, rest.length - gap, rest.continues)
        gap, row = gaps.pop(place)
        rows[row].append(rest)
        if gap > rest.length:
            bisect.insort(gaps, (gap - rest.length, row))
    return rows
