"""Rows of a benchmark of models: columns, which rows are measured, reasons of failures."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarking.results import check_header
from benchmarking.whole_models.kernel_groups import GROUPS
from infllm_flex.patch import UnsupportedModelError

MEASURED = "measured"
_OF_CASE = ("phase", "model", "activations", "layers", "B", "S", "dtype", "dense_backend")
_OF_CODE = ("device", "torch", "triton", "transformers", "commit")
COLUMNS = (
    *(*_OF_CASE, "attention", "result", "ms_p20", "ms_p50", "ms_p80", "peak_mib"),
    *(f"ms_{group}" for group in (*GROUPS, "gaps")),
    *("tile_tokens", "inflation", *_OF_CODE, "date"),
)


class Done:
    """Which measurements a CSV holds, of the same code, versions and device.

    Args:
        path: The CSV; it may be missing.
        common: Cells of this run for device, versions and commit.

    Raises:
        ValueError: The file has other columns.
    """

    def __init__(self, path: Path, common: Mapping[str, str]) -> None:
        self._keys: set[tuple[str, ...]] = set()
        if not path.exists() or path.stat().st_size == 0:
            return
        check_header(path, (COLUMNS,))
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if all(row[name] == common[name] for name in _OF_CODE):
                    self._keys.add(_key(row))

    def holds(self, cells: Mapping[str, Any]) -> bool:
        """Whether the measurement that these cells describe is done."""
        return _key(cells) in self._keys


def reason_for(error: BaseException) -> str:
    """Return the reason that stands in a cell instead of a time: a word, a colon and the error."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory"
    kind = "not supported" if isinstance(error, _UNSUPPORTED) else "failed"
    return f"{kind}: {text[:200]}"


_UNSUPPORTED = (UnsupportedModelError, NotImplementedError)


def _key(cells: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(cells[name]) for name in _OF_CASE)
