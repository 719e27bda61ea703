"""Documents into rows of one length, with few cut and next to nothing wasted."""

from __future__ import annotations

import bisect
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Part of a document.

    Attributes:
        start: Its first token, counted from the start of all text.
        length: Tokens.
        goes_on: Whether the token behind it belongs to the same document.
    """

    start: int
    length: int
    goes_on: bool


def pack(pieces: list[Piece], length: int) -> list[list[Piece]]:
    """Fill as few rows as the tokens need at all.

    Best fit in order of decreasing length: each piece goes where it leaves the smallest gap. One
    that fits nowhere is cut, its first part filling the largest gap, so that never more than one
    row's worth of tokens is wasted in all.

    Args:
        pieces: Of at most ``length`` tokens each.
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
            rest = Piece(rest.start + gap, rest.length - gap, rest.goes_on)
        gap, row = gaps.pop(place)
        rows[row].append(rest)
        if gap > rest.length:
            bisect.insort(gaps, (gap - rest.length, row))
    return rows
