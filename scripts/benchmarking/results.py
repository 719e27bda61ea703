"""The CSV of a benchmark: one row per measurement, written before the next one begins."""

from __future__ import annotations

import csv
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from benchmarking.report import shape_of

if TYPE_CHECKING:
    from typing_extensions import Self  # comes with torch

COLUMNS = (
    *("op", "variant", "settings", "mode", "inputs", "B", "Hq", "Hkv", "S", "D", "dtype"),
    *("ms_p20", "ms_p50", "ms_p80", "ms_floor", "tflops", "peak_mib"),
    *("device", "torch", "triton", "commit", "date"),
)
_EARLIER = tuple(name for name in COLUMNS if name != "settings")  # files of before `variants`


class CsvFile:
    """A CSV file, and the rows that this run has added to it.

    Args:
        path: The file. Its rows are kept; new rows are appended.
        columns: Columns of the file.
        common: Cells that are equal in all rows of the run.

    Raises:
        ValueError: The file exists with other columns.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], common: dict[str, str]) -> None:
        self.rows: list[dict[str, str]] = []
        self._columns, self._common = columns, common
        is_new = _is_missing(path)
        if not is_new:
            check_header(path, (columns,))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")
        if is_new:
            self._writer.writeheader()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, **cells: Any) -> None:
        """Write a row at once; columns that are not given are empty."""
        row = dict.fromkeys(self._columns, "") | self._common
        row |= {name: _format(value) for name, value in cells.items()}
        self._writer.writerow({name: row[name] for name in self._columns})
        self._file.flush()
        self.rows.append(row)


class Results(CsvFile):
    """The CSV of ``scripts/benchmark.py``.

    Args:
        path: The file. Its rows are kept; new rows are appended.
        common: Cells that are equal in all rows of the run.
        has_variants: Whether rows will have a value in the column ``settings``.

    Raises:
        ValueError: The file exists with other columns, or without the column ``settings``.
    """

    def __init__(self, path: Path, common: dict[str, str], *, has_variants: bool = False) -> None:
        known = COLUMNS if _is_missing(path) else check_columns(path, has_variants=has_variants)
        super().__init__(path, known, dict.fromkeys(COLUMNS, "") | common)

    def shape_key(self, **cells: Any) -> tuple[str, ...]:
        """Return the shape of a row with these cells, as in `report.SHAPE`."""
        row = self._common | {name: _format(value) for name, value in cells.items()}
        return shape_of(row)


def check_header(path: Path, known: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the columns of a CSV.

    Args:
        path: The file.
        known: The headers that it may have.

    Raises:
        ValueError: The file cannot be read, has another header, or its last line is cut.
    """
    try:
        with path.open(newline="") as file:
            columns = tuple(next(csv.reader(file), []))
            rest = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a CSV: {error}") from error
    if columns not in known:
        raise ValueError(
            f"{path} has other columns than this benchmark writes; move it away or name another"
        )
    if rest and not rest.endswith("\n"):
        raise ValueError(f"{path}: its last line is cut: complete or remove it")
    return columns


def _is_missing(path: Path) -> bool:
    return not path.exists() or path.stat().st_size == 0


def check_columns(path: Path, *, has_variants: bool = False) -> tuple[str, ...]:
    """Return the columns of a CSV of this benchmark.

    Args:
        path: The file.
        has_variants: Whether it needs the column ``settings``.

    Raises:
        ValueError: The file is no such CSV, or lacks that column.
    """
    columns = check_header(path, (COLUMNS, _EARLIER))
    if has_variants and columns == _EARLIER:
        raise ValueError(
            f"{path} has no column 'settings', which variants need; move it away or name another"
        )
    return columns


def read_results(path: Path) -> list[dict[str, str]]:
    """Read all rows of a CSV; ``settings`` is empty where a file lacks that column.

    Raises:
        ValueError: The file is no CSV of this benchmark.
    """
    check_columns(path)
    with path.open(newline="") as file:
        return [{"settings": "", **row} for row in csv.DictReader(file)]


def _format(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
