#!/usr/bin/env python3
"""Time whole models: prefill, decoding and training steps, dense and patched in turns.

    scripts/benchmark_models.py --config configs/bench_models.yaml [--cases NAME,NAME]
                                [--max-seconds N] [section.key=value ...]

Weights are random, made on the device; the dense and the patched model share them. Before a model
is timed its attention is checked. Every measurement is appended to the CSV `run.out` at once, and
the same command continues a run that was stopped: what the CSV holds of this code, these versions
and this device is not measured again. A measurement that fails, for want of memory or support, has
the reason in its cell.

Exit status: 0 done or out of time, 1 wrong attention or another failure, 2 settings that cannot be
used (nothing was run), 130 stopped by Ctrl-C (earlier measurements are kept).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarking.correctness import IncorrectError
from benchmarking.environment import describe_environment, prepare_device
from benchmarking.results import CsvFile
from benchmarking.whole_models.checks import attention_of, check_pair
from benchmarking.whole_models.clock import Deadline, OutOfTimeError
from benchmarking.whole_models.measurements import (
    Measurement,
    free_memory,
    longest_by_model,
    measurements_of,
    time_pair,
)
from benchmarking.whole_models.pairs import Pair, build_pair
from benchmarking.whole_models.rows import COLUMNS, MEASURED, Done, reason_for
from benchmarking.whole_models.settings import ModelBenchmark
from benchmarking.whole_models.tables import tables
from commands.messages import say, show_warnings
from commands.standard_output import run_command
from evaluation.quality.base import BaseError
from evaluation.table import format_table
from evaluation.tile_overlap import tile_inflation, trained_model
from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import patch_model
from infllm_flex.strict_yaml import ConfigError, build_dataclass, load_yaml, to_yaml


def main() -> int:
    """Run the command and return its exit status."""
    options = parse_arguments()
    show_warnings()
    try:
        settings = read_settings(options)
        if options.print_config:
            print(to_yaml(settings), end="")
            return 0
        device = prepare_device(settings.run.device, settings.run.threads)
        common = common_cells(device)
        measurements = measurements_to_make(settings, common)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        return measure(settings, measurements, common)
    except KeyboardInterrupt:
        print(f"stopped; earlier measurements are in {settings.run.out}", file=sys.stderr)
        return 130
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file of configs/")
    parser.add_argument("--cases", metavar="NAME,NAME", help="cases of the file; else all")
    parser.add_argument(
        "--max-seconds",
        type=float,
        metavar="N",
        help="instead of run.max_seconds: nothing begins later; a run that has begun ends",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--print-config", action="store_true", help="show all settings and stop")
    return parser.parse_intermixed_args()


def read_settings(options: argparse.Namespace) -> ModelBenchmark:
    """Read the file and the command line.

    Raises:
        ConfigError: The file or an override is wrong.
        ValueError: A case is unknown.
    """
    settings = build_dataclass(ModelBenchmark, load_yaml(options.config, options.overrides))
    if options.cases is not None:
        names = options.cases.split(",")
        if unknown := [name for name in names if name not in settings.cases]:
            raise ValueError(
                f"--cases must be names of cases, {', '.join(settings.cases)}; got "
                f"{', '.join(unknown)}"
            )
        cases = {name: settings.cases[name] for name in names}
        settings = dataclasses.replace(settings, cases=cases)
    if options.max_seconds is not None:
        run = dataclasses.replace(settings.run, max_seconds=options.max_seconds)
        settings = dataclasses.replace(settings, run=run)
    return settings


def common_cells(device: torch.device) -> dict[str, str]:
    """Return the cells for device, versions, commit and date."""
    import transformers

    return describe_environment(device) | {"transformers": transformers.__version__}


def measurements_to_make(settings: ModelBenchmark, common: dict[str, str]) -> list[Measurement]:
    """Return the measurements that the CSV does not hold yet.

    Raises:
        ValueError: The CSV has other columns.
    """
    done = Done(settings.run.out, common)
    wanted = list(measurements_of(settings))
    missing = [one for one in wanted if not done.holds(one.cells(settings.run))]
    if len(missing) < len(wanted):
        print(f"{len(wanted) - len(missing)} measurements are in {settings.run.out} already")
    return missing


def measure(
    settings: ModelBenchmark, measurements: Sequence[Measurement], common: dict[str, str]
) -> int:
    """Make the measurements, print the tables, and return the exit status."""
    deadline = Deadline(settings.run.max_seconds)
    with CsvFile(settings.run.out, COLUMNS, common) as out:
        measurer = Measurer(settings, out, deadline)
        number = 0
        try:
            for number, measurement in enumerate(measurements, 1):
                say(f"[{number}/{len(measurements)}] {measurement}")
                measurer.measure(measurement)
        except OutOfTimeError:
            left = len(measurements) - number + 1
            print(f"out of time, {left} measurements are left; the same command makes them")
        finally:
            report(settings, out)
    return int(measurer.found_wrong)


class Measurer:
    """Makes measurements one by one, and builds and checks models when they change.

    Args:
        settings: The run.
        out: The CSV.
        deadline: End of the run.

    Attributes:
        found_wrong: Whether the attention of a model was wrong.
    """

    def __init__(self, settings: ModelBenchmark, out: CsvFile, deadline: Deadline) -> None:
        self.found_wrong = False
        self._settings, self._out, self._deadline = settings, out, deadline
        self._pair: Pair | None = None
        self._built: object = None
        self._refusal = ""  # why nothing of the pair is measured

    def measure(self, measurement: Measurement) -> None:
        """Make one measurement; its rows hold the reason where it fails.

        Raises:
            OutOfTimeError: The deadline came first.
        """
        self._deadline.check()
        try:
            reason = self._carry_out(measurement)
        except BaseError as error:
            reason = f"not installed: {error}"
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = reason_for(error)
        if reason:
            say(f"warning: {measurement}: {reason}")
            cells = measurement.cells(self._settings.run) | {"result": reason}
            for attention in ("dense", "sparse"):
                self._out.add(**cells, attention=attention)
        free_memory()

    def _carry_out(self, measurement: Measurement) -> str:
        """Make one measurement; return why its models cannot be measured, or nothing."""
        if measurement.activations == "trained":
            assert measurement.shape.package is not None  # the settings were checked
            model, ids = trained_model(measurement.shape.package, measurement.length)
            self._add_overlap(measurement, model, measurement.shape.attention, input_ids=ids)
            return ""
        if self._built != measurement.pair:
            self._build(measurement)
        pair, run = self._pair, self._settings.run
        if pair is None:
            return self._refusal
        if measurement.case.phase == "overlap":
            embeds = pair.embeddings(1, measurement.length, run.seed)
            self._add_overlap(measurement, pair.sparse, None, inputs_embeds=embeds)
        else:
            time_pair(run, measurement, pair, self._out, self._deadline)
        return ""

    def _add_overlap(
        self, measurement: Measurement, model: Any, attention: InfLLMConfig | None, **inputs: Tensor
    ) -> None:
        """Write a row for every size of tiles."""
        if attention is not None:
            patch_model(model, attention)
        cells = measurement.cells(self._settings.run) | {"attention": "sparse", "result": MEASURED}
        for tokens, ratio in tile_inflation(model, attention_of(model), **inputs).items():
            self._out.add(**cells, tile_tokens=tokens, inflation=ratio)

    def _build(self, measurement: Measurement) -> None:
        """Build and check the models of a measurement."""
        self._pair, self._built, self._refusal = None, measurement.pair, ""
        free_memory()
        run, lengths = self._settings.run, longest_by_model(self._settings)
        try:
            pair = build_pair(
                run,
                measurement.shape,
                measurement.layers,
                measurement.activations,
                lengths[measurement.model],
            )
            check_pair(run, pair)
        except IncorrectError as error:
            self.found_wrong, self._refusal = True, f"wrong: {error}"
        except (RuntimeError, ValueError, NotImplementedError) as error:
            self._refusal = reason_for(error)
        else:
            self._pair = pair


def report(settings: ModelBenchmark, out: CsvFile) -> None:
    """Print the tables of what this run measured."""
    whole = {name: shape.num_layers for name, shape in settings.models.items()}
    for title, (header, lines) in tables(out.rows, whole).items():
        print(f"\n{title}\n\n{format_table(header, lines)}")
    print(f"\n{len(out.rows)} rows added to {settings.run.out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
