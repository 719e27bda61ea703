"""The CSV of a benchmark: one row per measurement, written before the next one begins."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarking.checkout import ROOT

COLUMNS = (
    *("op", "variant", "settings", "mode", "inputs", "B", "Hq", "Hkv", "S", "D", "dtype"),
    *("ms_p20", "ms_p50", "ms_p80", "ms_floor", "tflops", "peak_mib"),
    *("device", "torch", "triton", "commit", "date"),
)
_EARLIER = tuple(name for name in COLUMNS if name != "settings")  # files of before `variants`
# Changes here that are not committed mark a row `+changes`.
_MEASURED = ("infllm_flex", "custom_ops", "scripts/benchmarking", "scripts/evaluation")


class Results:
    """A CSV file, and the rows that this run has added to it.

    Args:
        path: The file. Its rows are kept; new rows are appended.
        common: Cells that are equal in all rows of the run.
        has_variants: Whether rows will have a value in the column ``settings``.

    Raises:
        ValueError: The file exists with other columns, or without the column ``settings``.
    """

    def __init__(self, path: Path, common: dict[str, str], *, has_variants: bool = False) -> None:
        self.rows: list[dict[str, str]] = []
        self._common = common
        is_new = not path.exists() or path.stat().st_size == 0
        columns = COLUMNS if is_new else check_columns(path, has_variants=has_variants)
        self._unwritten = set(COLUMNS) - set(columns)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")
        if is_new:
            self._writer.writeheader()

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, **cells: Any) -> None:
        """Write a row; columns that are not given are empty."""
        row = dict.fromkeys(COLUMNS, "") | self._common
        row |= {name: _format(value) for name, value in cells.items()}
        self._writer.writerow({k: v for k, v in row.items() if k not in self._unwritten})
        self._file.flush()
        self.rows.append(row)


def check_columns(path: Path, *, has_variants: bool = False) -> tuple[str, ...]:
    """Return the columns of a CSV of this benchmark.

    Args:
        path: The file.
        has_variants: Whether it needs the column ``settings``.

    Raises:
        ValueError: The file is no such CSV, or lacks that column.
    """
    try:
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a CSV: {error}") from error
    columns = tuple(header)
    if columns not in (COLUMNS, _EARLIER):
        raise ValueError(
            f"{path} has other columns than this benchmark writes; move it away or name another"
        )
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


def describe_environment(device: torch.device) -> dict[str, str]:
    """Return the cells for device, versions, commit and date."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "device": _device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
        "date": now.isoformat(timespec="seconds"),
    }


def _format(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Return the commit, marked where the measured code has changes that are not in it."""
    try:
        commit = _git("rev-parse", "--short=10", "HEAD").strip()
        changed = _git("status", "--porcelain", "--", *_MEASURED).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+changes" if changed else commit


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
