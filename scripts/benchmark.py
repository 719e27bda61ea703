#!/usr/bin/env python3
"""Time sparse attention against the dense attentions of the machine.

    scripts/benchmark.py --config configs/bench_cpu.yaml [section.key=value ...]

The operators are tested on the device first; where they are wrong, nothing is timed. Every
measurement is appended to the CSV `run.out` at once. scripts/plot.py draws the CSV.

Exit status: 0 done, 1 wrong operators or another failure, 2 settings that cannot be used (nothing
was run), 130 stopped by Ctrl-C (earlier measurements are kept).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarking.correctness import IncorrectError, check_operators, run_tests
from benchmarking.environment import describe_environment, prepare_device
from benchmarking.memory import limit_mib, peak_mib
from benchmarking.models import model_subjects
from benchmarking.report import Reasons, model_ratio, speed_table, verdict
from benchmarking.results import Results, check_columns
from benchmarking.settings import (
    BenchmarkSettings,
    CaseSettings,
    Heads,
    ModelSettings,
)
from benchmarking.subjects import make_subjects
from benchmarking.timing import Limits, time_in_rotation
from benchmarking.work import work_of
from commands.messages import show_warnings
from commands.standard_output import run_command
from evaluation.table import format_table
from infllm_flex.strict_yaml import ConfigError, build_dataclass, load_yaml, to_yaml


def main() -> int:
    """Run the command and return its exit status."""
    options = parse_arguments()
    show_warnings()
    try:
        settings = build_dataclass(BenchmarkSettings, load_yaml(options.config, options.overrides))
        if settings.run.out.exists():
            check_columns(settings.run.out, has_variants=bool(settings.variants))
        if options.print_config:
            print(to_yaml(settings), end="")
            return 0
        prepare_device(settings.run.device, settings.run.threads)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        benchmark(settings)
    except KeyboardInterrupt:
        print(f"stopped; earlier measurements are in {settings.run.out}", file=sys.stderr)
        return 130
    except IncorrectError as error:
        print(f"error: nothing was timed: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--print-config", action="store_true", help="show all settings and stop")
    return parser.parse_intermixed_args()


def benchmark(settings: BenchmarkSettings) -> None:
    """Test the operators, measure, and print the results."""
    run = settings.run
    check(settings)
    about = describe_environment(torch.device(run.device))
    with Results(run.out, about, has_variants=bool(settings.variants)) as results:
        progress = Progress(count_steps(settings))
        verdicts: list[str] = []
        reasons: dict[tuple[str, ...], dict[str, str]] = {}
        try:
            for case, heads, S in shapes_of(settings):
                batch = settings.with_batch_of(case).shapes.batch
                shape = f"batch {batch}, {heads} heads, {S} tokens"
                progress.begin(f"{case.row_mode}, {case.inputs} queries, {shape}")
                key, absent = time_shape(settings, case, heads, S, results)
                reasons[key] = absent
            verdicts += measure_memory(settings, results, progress)
            for name, model in settings.models.items():
                progress.begin(f"model {name}, {model.length} tokens")
                verdicts += time_model(settings, name, model, results)
        finally:
            progress.close()
            report(results, verdicts, reasons)


def check(settings: BenchmarkSettings) -> None:
    """Check the operators on this device.

    Raises:
        IncorrectError: An operator is wrong.
    """
    if settings.run.tests:
        print(f"testing: {' '.join(settings.run.tests)}", flush=True)
        run_tests(settings.run.tests)
    for heads in settings.shapes.pairs:
        for name in settings.attentions:
            what = f"{heads} heads, {name}" if name else f"{heads} heads"
            print(f"comparing with the float64 reference: {what}", flush=True)
            check_operators(settings.with_attention(name), heads)


def shapes_of(settings: BenchmarkSettings) -> Iterator[tuple[CaseSettings, Heads, int]]:
    """Yield every shape to time, in order."""
    for case in settings.cases.values():
        for heads in settings.shapes.pairs:
            for S in case.lengths:
                yield case, heads, S


def count_steps(settings: BenchmarkSettings) -> int:
    """Count the steps of the progress bar."""
    memory = len(settings.memory.lengths) * len(settings.shapes.heads)
    return len(list(shapes_of(settings))) + memory + len(settings.models)


def time_shape(
    settings: BenchmarkSettings, case: CaseSettings, heads: Heads, S: int, results: Results
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Time all stages and all baselines at one shape, in rotation.

    Returns:
        The shape, as in `report.SHAPE`, and the reason for each baseline without a time.
    """
    run, settings = settings.run, settings.with_batch_of(case)
    shape = shape_cells(settings, heads, S) | {"inputs": case.inputs}
    key = results.shape_key(mode=case.row_mode, **shape)
    try:
        subjects, unavailable = make_subjects(settings, heads, S, case)
        for name, reason in unavailable.items():
            if not reason.startswith("not installed"):  # else its cell says it
                warnings.warn(f"{name}, {heads} heads, {S} tokens: {reason}", stacklevel=2)
        limits = Limits(run.warmup, run.rounds, run.max_rounds, run.seconds)
        timings = time_in_rotation(subjects, torch.device(run.device), limits)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        warnings.warn(f"{heads} heads, {S} tokens are skipped: {error}", stacklevel=2)
        return key, {}
    for subject, parts in zip(subjects, timings, strict=True):
        for part, timing in parts.items():
            if part == "forward" != case.mode and subject.backward is not None:
                continue  # this forward saves tensors for backward, unlike that of mode `forward`
            mode = part if subject.backward is not None else case.row_mode
            cells: dict[str, Any] = dict(zip(("ms_p20", "ms_p50", "ms_p80"), timing, strict=True))
            of_subject = settings.with_attention(subject.settings)
            of_part = "decode" if case.mode == "decode" else part
            work = work_of(subject.op, of_part, of_subject, heads, S)
            if work is not None:
                cells["tflops"] = work.flops / timing.p50 / 1e9
                if settings.floor is not None:
                    cells["ms_floor"] = work.floor_ms(settings.floor)
            cells |= {"op": subject.op, "variant": subject.variant, "settings": subject.settings}
            results.add(mode=mode, **cells, **shape)
    return key, unavailable


def measure_memory(settings: BenchmarkSettings, results: Results, progress: Progress) -> list[str]:
    """Measure the peak memory of forward and backward; return the comparisons with the limit."""
    verdicts = []
    for heads in settings.shapes.pairs:
        for S in settings.memory.lengths:
            progress.begin(f"memory, {heads} heads, {S} tokens")
            with tempfile.TemporaryDirectory() as folder:
                peak = peak_mib(settings, heads, S, Path(folder))
            results.add(
                op="infllm_attention",
                variant=settings.attention.engine,
                mode="forward+backward",
                inputs="drifting",
                peak_mib=peak,
                **shape_cells(settings, heads, S),
            )
            what = f"peak memory of forward and backward, {heads} heads, {S} tokens"
            verdicts.append(verdict(what, peak, limit_mib(settings, heads, S), " MiB"))
    return verdicts


def time_model(
    settings: BenchmarkSettings, name: str, model: ModelSettings, results: Results
) -> list[str]:
    """Time a model patched and unpatched; return the ratio, compared with its limit."""
    subjects = model_subjects(settings, model)
    limits = Limits(max(3, settings.run.warmup), model.rounds, model.rounds, 0)
    timings = time_in_rotation(subjects, torch.device(settings.run.device), limits)
    shape = shape_cells(settings, Heads(model.num_heads, model.num_kv_heads), model.length)
    shape["D"] = model.hidden_size // model.num_heads
    for subject, parts in zip(subjects, timings, strict=True):
        p20, p50, p80 = parts[model.mode]
        cells = {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "inputs": name}
        results.add(op="model", variant=subject.variant, mode=model.mode, **shape, **cells)
    ratio = model_ratio(results.rows[-2:])
    what = f"model {name}, {model.length} tokens, patched over unpatched time"
    return [
        f"{what}: {ratio:.3f}" if model.limit is None else verdict(what, ratio, model.limit, "")
    ]


def shape_cells(settings: BenchmarkSettings, heads: Heads, S: int) -> dict[str, Any]:
    """Return the cells of the CSV that describe the shape."""
    shapes = settings.shapes
    return {
        "B": shapes.batch,
        "Hq": heads.query,
        "Hkv": heads.kv,
        "S": S,
        "D": shapes.head_dim,
        "dtype": settings.run.dtype,
    }


def report(results: Results, verdicts: list[str], reasons: Reasons) -> None:
    """Print the results, also those of an interrupted run."""
    header, lines = speed_table(results.rows, reasons)
    if lines:
        print("\nmedians in ms; x: speed-up over the attention left of it, selection included")
        if "x default" in header:
            print("x default: speed-up over the settings of `attention`")
        print()
        print(format_table(header, lines))
    if verdicts:
        print("\n" + "\n".join(verdicts))
    print(f"\n{len(results.rows)} rows added to the CSV")


class Progress:
    """A progress bar on a terminal with tqdm installed, else one line per step."""

    def __init__(self, total: int) -> None:
        self._total, self._begun = total, 0
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, unit="step", dynamic_ncols=True, file=sys.stderr)

    def begin(self, what: str) -> None:
        """Mark the previous step as done, and name the next one."""
        self._begun += 1
        if self._bar is None:
            print(f"[{self._begun}/{self._total}] {what}", file=sys.stderr, flush=True)
            return
        self._bar.update(self._begun - 1 - self._bar.n)
        self._bar.set_description_str(what)

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    sys.exit(run_command(main))
