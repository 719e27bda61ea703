"""Run the benchmark's scripts within the test process."""

from __future__ import annotations

import csv
import importlib.util
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = """\
run: {out: OUT, rounds: 2, max_rounds: 2}
shapes: {heads: [4/2], head_dim: 16}
attention:
  {kernel_size: 8, kernel_stride: 4, block_size: 16, window_size: 32, topk: 3, dense_len: -1}
engines: [fused]
cases:
  short: {lengths: [256]}
  training: {lengths: [256], mode: forward+backward, inputs: independent}
"""


def write_config(folder):
    """Write the config of a small benchmark that writes ``out.csv`` beside it."""
    path = folder / "bench.yaml"
    path.write_text(CONFIG.replace("OUT", str(folder / "out.csv")))
    return path


def script_runner(monkeypatch, capsys):
    """Return a function that runs a script and returns status, standard output and error."""

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.showwarning", warnings.showwarning)  # the command replaces it
            status = module.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def rows_of(path):
    """Read the rows of a CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
