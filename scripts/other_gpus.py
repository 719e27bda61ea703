#!/usr/bin/env python3
"""Say what the kernels need on GPUs that are not here, and how long they may take there.

    scripts/other_gpus.py [--reuse]

First every kernel is compiled for sm_80, sm_89, sm_90 and sm_100, and a table shows registers,
spills, shared memory and the instructions of a step of its inner loop. Then times are predicted
from these instructions and the cards' published rates, fitted on one measured card and held against
another. Both tables are written as CSV files, instead of those that are there. Compiling takes some
minutes; --reuse reads the first table instead. Needs Triton and pytest, and no GPU.

Exit status: 0 done, 1 a kernel does not compile, 2 files that cannot be used.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarking.checkout import ROOT
from benchmarking.environment import describe_environment
from benchmarking.other_gpus.cards import H100, H200, OTHERS, Card
from benchmarking.other_gpus.prediction import (
    ATTEND,
    BACKWARD,
    DECODE,
    SELECT,
    Case,
    Fit,
    Model,
    cases_of,
    inflation_of,
)
from benchmarking.other_gpus.resources import CAPABILITIES, STAGES, KernelUse, measure
from benchmarking.results import read_results
from benchmarking.settings import BenchmarkSettings, Heads
from commands.standard_output import run_command
from evaluation.table import format_table
from infllm_flex.strict_yaml import build_dataclass, load_yaml

RESULTS = ROOT / "docs" / "results"
GROUPS = (16, 8, 4, 1)  # query heads per key/value head that were measured
MAIN_GROUP = 16  # the one whose selection and decoding are compiled, and whose table is printed
KINDS = (ATTEND, BACKWARD, SELECT, DECODE)
LENGTHS = (32_768, 65_536, 131_072)
COLUMNS = ("card", "what", "Hq", "Hkv", "S", "B", "ms", "ms_overlapped", "ms_serial", "ms_measured")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(ROOT / "configs/bench_h200.yaml"), metavar="FILE")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the CSV files are")
    parser.add_argument("--reuse", action="store_true", help="read kernels.csv, compile nothing")
    options = parser.parse_args(arguments)
    kernels = options.folder / "kernels.csv"
    try:
        settings = build_dataclass(BenchmarkSettings, load_yaml(options.config))
        h100, h200 = (read_results(RESULTS / f"bench_{card}.csv") for card in ("h100", "h200"))
        uses = read_uses(kernels) if options.reuse else []
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    about = describe_environment(torch.device("cpu"))
    if not options.reuse:
        uses = list(compile_all())
        write(kernels, KernelUse._fields, [use._asdict() for use in uses], about)
    print("\n" + format_table(*kernel_table(uses)))
    model = Model(settings, uses, inflation_of([*h100, *h200]))
    measured = {H100: cases_of(h100, H100), H200: cases_of(h200, H200)}
    fit = model.fit(measured[H100], H100)
    rows = [row for card, cases in measured.items() for row in predict(model, fit, card, cases)]
    print("\n" + format_table(*error_table(rows)))
    asked = [Case(what, Heads(32, 2), S) for what in KINDS for S in LENGTHS]
    others = [row for card in OTHERS for row in predict(model, fit, card, asked)]
    print("\n" + format_table(*other_table(others)))
    write(options.folder / "predicted_times.csv", COLUMNS, [*rows, *others], about)
    return 0


def compile_all() -> Iterable[KernelUse]:
    """Compile all kernels for all GPUs."""
    for stage in STAGES:
        for G in GROUPS if stage == "attention" else (MAIN_GROUP,):
            for capability in CAPABILITIES:
                print(f"{stage}, {G} heads to a group, sm_{capability}", file=sys.stderr)
                yield from measure(stage, G, capability)


def read_uses(path: Path) -> list[KernelUse]:
    """Read the table of kernels.

    Raises:
        OSError: It does not exist.
        ValueError: It has other columns.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = KernelUse._fields
    if not rows or not set(names) <= set(rows[0]):
        raise ValueError(f"{path} is no table of kernels; leave out --reuse to write it")
    text = ("stage", "kernel")
    return [KernelUse(**{n: row[n] if n in text else int(row[n]) for n in names}) for row in rows]  # type: ignore[arg-type]


def write(
    path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]], about: dict[str, str]
) -> None:
    """Write a CSV, with the versions and the commit in every row."""
    versions = {name: about[name] for name in ("torch", "triton", "commit", "date")}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*columns, *versions), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(rounded | versions)
    print(f"{path}: written", file=sys.stderr)


def predict(model: Model, fit: Fit, card: Card, cases: Iterable[Case]) -> Iterable[dict[str, Any]]:
    """Predict times on a card, with the bounds of attention."""
    for case in cases:
        ms = model.predict(case, card, fit) if model.covers(case, card) else None
        if ms is None:
            continue
        row = dict.fromkeys(COLUMNS, "") | {"card": card.name, "what": case.what, "S": case.S}
        row |= {"Hq": case.heads.query, "Hkv": case.heads.kv, "B": case.batch}
        row["ms"] = ms
        if case.what in (ATTEND, BACKWARD):
            bounds = model.bounds(case, card)
            row |= {"ms_overlapped": bounds.overlapped, "ms_serial": bounds.serial}
        yield row | {"ms_measured": case.measured or ""}


def kernel_table(uses: Iterable[KernelUse]) -> tuple[list[str], list[list[str]]]:
    """Tabulate kernels of one group size by GPU: registers, spills, KiB, instructions."""
    header = ["kernel", *(f"sm_{capability}" for capability in CAPABILITIES)]
    lines: dict[str, dict[int, str]] = {}
    for use in uses:
        if use.group == MAIN_GROUP:
            cell = f"{use.registers} / {use.spilled} / {use.shared / 1024:.0f}"
            cell += f" / {use.instructions}"
            lines.setdefault(use.kernel, {})[use.capability] = cell
    return header, [
        [name, *(cells.get(capability, "-") for capability in CAPABILITIES)]
        for name, cells in lines.items()
    ]


def error_table(rows: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Tabulate how far predictions are from measurements, in percent."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        error = 100 * (row["ms"] / row["ms_measured"] - 1)
        found.setdefault((row["card"], row["what"]), []).append(error)
    header = ["card", "what", "rows", "median error %", "median of its size %", "largest %"]
    return header, [
        [card, what, str(len(errors)), f"{median(errors):+.0f}"]
        + [f"{f(abs(error) for error in errors):.0f}" for f in (median, max)]
        for (card, what), errors in found.items()
    ]


def other_table(rows: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Tabulate predictions by operation and card, one column for each length."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        lines.setdefault((row["what"], row["card"]), []).append(f"{row['ms']:.3g}")
    header = ["predicted ms, 32/2 heads", "card", *(f"{S // 1024}K" for S in LENGTHS)]
    return header, [[*place, *cells] for place, cells in sorted(lines.items())]


if __name__ == "__main__":
    sys.exit(run_command(main))
