"""Packing keeps every token, needs as few rows as possible and rarely splits a piece."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from infllm_flex.training.data.packing import Piece, pack


def pieces(lengths):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [Piece(start, length, False) for start, length in zip(starts, lengths, strict=True)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 20), max_size=40))
def test_every_token_is_in_one_row_and_the_number_of_rows_is_minimal(lengths):
    rows = pack(pieces(lengths), 20)
    assert len(rows) == -(-sum(lengths) // 20)
    assert all(sum(piece.length for piece in row) <= 20 for row in rows)
    tokens = [p.start + i for row in rows for p in row for i in range(p.length)]
    assert sorted(tokens) == list(range(sum(lengths)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 20), max_size=40))
def test_only_the_last_piece_of_a_document_does_not_continue(lengths):
    given_pieces = pieces(lengths)
    ends = {piece.start + piece.length for piece in given_pieces}
    for row in pack(given_pieces, 20):
        for piece in row:
            assert piece.continues == (piece.start + piece.length not in ends)


def test_pieces_that_fit_are_not_split():
    rows = pack(pieces([12, 8, 15, 5, 20, 10, 10]), 20)
    assert sorted(tuple(sorted(p.length for p in row)) for row in rows) == [
        (5, 15),
        (8, 12),
        (10, 10),
        (20,),
    ]


def test_a_piece_of_a_longer_document_still_continues():
    (row,) = pack([Piece(0, 5, True)], 8)
    assert row == [Piece(0, 5, True)]
