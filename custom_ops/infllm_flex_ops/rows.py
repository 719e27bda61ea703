"""Rows of a key/value cache in one piece. Reads values: for definitions on the CPU."""

from __future__ import annotations

from torch import Tensor


def check_room(row: int, end: int, slots: int) -> None:
    """Raise a ValueError unless a cache of ``slots`` slots holds a row up to ``end``."""
    if end > slots:
        raise ValueError(f"k must hold {end} slots in row {row}, got {slots}")


def next_rows(
    start: Tensor,
    end: Tensor,
    new_start: Tensor | None,
    new_end: Tensor | None,
    num_new: int,
    slots: int,
) -> list[tuple[int, int]]:
    """Return where each row starts and ends once ``num_new`` slots are appended; write nothing.

    The arguments are those of ``append_windows``, and the number of slots of the cache.

    Raises:
        ValueError: A row begins before the cache or ends behind it.
    """
    starts = start if new_start is None else new_start.expand_as(start).long()
    ends = end + num_new if new_end is None else new_end.expand_as(end).long()
    rows = list(zip(starts.tolist(), ends.tolist(), strict=True))
    for row, (row_start, row_end) in enumerate(rows):
        check_room(row, row_end, slots)
        if row_start < 0:
            raise ValueError(f"start must be 0 or more, got {row_start} in row {row}")
    return rows
