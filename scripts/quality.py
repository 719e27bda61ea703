#!/usr/bin/env python3
"""Measure how much of dense attention's quality sparse settings keep on a pretrained model.

    scripts/quality.py --config configs/quality_smollm2_16k.yaml [section.key=value ...]

The base is tuned densely, with every sparse setting, and with two controls that see as many tokens
without selection, all on the same samples. Then each model answers the same questions. Without a
section ``tuning`` the base answers as it is. Results are printed, written as CSV, and drawn.
Finished parts are saved: the same command continues after an interruption. --processes N does N
parts at once, spread over the GPUs; two or three on each GPU are faster than one, where they fit.
--parts limits the work to some parts. Exit status: 0 done, 1 failed, 2 settings that cannot be
used, 128 + signal stopped.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from types import FrameType

import torch

from commands.messages import NO_PLOT, say, show_warnings
from commands.outputs import check_output
from commands.standard_output import run_command
from evaluation.quality import base, text
from evaluation.quality.parts import Folder, Part
from evaluation.quality.plan import BASE, TEXT, chosen, plan
from evaluation.quality.plot import plot_quality
from evaluation.quality.processes import run_in_processes, stop_with_parent
from evaluation.quality.report import report
from evaluation.quality.results import gather, write_table
from evaluation.quality.settings import QualitySettings
from evaluation.quality.tuning import check_recipes
from evaluation.quality.work import StoppedError, Worker, longest
from infllm_flex.strict_yaml import ConfigError, build_dataclass, load_yaml
from infllm_flex.training.loop import TrainingDivergedError
from infllm_flex.training.parallel import pick_device

_LESS_MEMORY = (
    "To need less: judge.batch_size=1 and a smaller judge.generation_batch, or in training "
    "tuning.sequences_at_once=1 and tuning.checkpointing=true; or end other processes on the device"
)


def main() -> int:
    """Run the command and return its exit status."""
    show_warnings()
    options = parse_arguments()
    try:
        settings = build_dataclass(QualitySettings, load_yaml(options.config, options.overrides))
        check_recipes(settings)
        parts = plan(settings)
        wanted = chosen(parts, options.parts.split(",")) if options.parts else parts
        folder = Folder(settings.run.folder)
        folder.check(parts)
        if options.list:
            print("\n".join(f"{state(folder, part):8}{part.name}" for part in parts))
            return 0
        source = check_inputs(settings, folder, {part.name: part for part in parts})
        device = pick_device(settings.run.device)
    except ValueError as error:
        say(str(error) if isinstance(error, ConfigError) else f"error: {error}")
        return 2
    skipped: list[Part] = []
    try:
        if options.processes > 1:
            stop_on_signals(None)  # --max-seconds is theirs
            uses_gpus = device.type == "cuda"
            status = run_in_processes(same_command(options), options.processes, uses_gpus)
            if status:
                return status if status > 0 else 128 - status
        else:
            stop_on_signals(options.max_seconds)
            stop_with_parent()
            skipped = Worker(settings, device, source, say).do(wanted, parts)
    except StoppedError as stopped:
        say(str(stopped))
        return stopped.status
    except torch.OutOfMemoryError as error:
        say(f"error: {str(error).split('. ')[0]}. {_LESS_MEMORY}")
        return 1
    except (ValueError, OSError, RuntimeError, TrainingDivergedError) as error:
        say(f"error: {error}")
        return 1
    return show(settings, folder, parts, skipped)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--parts",
        metavar="NAMES",
        help="do only these parts and those they need: names separated by commas, * for any text, "
        "such as train:dense:0,judge:dense:0:*",
    )
    parser.add_argument("--list", action="store_true", help="show all parts and stop")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="parts to do at once (default: 1)"
    )
    parser.add_argument(
        "--max-seconds", type=float, metavar="N", help="stop after N seconds, as Ctrl-C does"
    )
    options = parser.parse_intermixed_args()
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    return options


def same_command(options: argparse.Namespace) -> list[str]:
    """Return the arguments of this Python that do the same work in one process."""
    command = [__file__, "--config", options.config, *options.overrides]
    if options.parts:
        command += ["--parts", options.parts]
    if options.max_seconds is not None:
        command += ["--max-seconds", str(options.max_seconds)]
    return command


def state(folder: Folder, part: Part) -> str:
    """Return whether a part is done, as a word."""
    return "done" if folder.result(part) is not None else "to do"


def check_inputs(
    settings: QualitySettings, folder: Folder, parts: dict[str, Part]
) -> base.Source | None:
    """Check outputs, base and text before any work.

    Returns:
        The source of the base; None where the base is in the folder already.

    Raises:
        ValueError: Base or text cannot be used, or an output cannot be written.
    """
    for name in ("table", "plot"):
        check_output(f"run.{name}", getattr(settings.run, name))
    if folder.result(parts[TEXT]) is None:
        text.find_folders(settings.text)
    variants = {name: variant.attention for name, variant in settings.variants.items()}
    prepared = folder.result(parts[BASE])
    if prepared is not None:
        source = base.Source(settings.run.folder / "base", None)
        base.check_links(source.folder, prepared.get(base.LINKS, {}))
        base.check(settings.base, source, longest(settings), variants)
        return None
    source = base.find(settings.base)
    base.check(settings.base, source, longest(settings), variants)
    return source


def stop_on_signals(max_seconds: float | None) -> None:
    """Make Ctrl-C, SIGTERM and the end of the time raise a StoppedError."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if max_seconds is not None:
        timer = threading.Timer(max_seconds, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()


def show(settings: QualitySettings, folder: Folder, parts: list[Part], skipped: list[Part]) -> int:
    """Print the tables, write the CSV and the plot of all finished parts, and return the status."""
    results = gather(settings, folder, parts)
    print(report(results), flush=True)
    missing = [part.name for part in parts if folder.result(part) is None]
    if missing:
        print(f"\n{len(missing)} of {len(parts)} parts are not done; the first is {missing[0]}")
    for part in skipped:
        print(f"skipped: {part.name}")
    if not results.found:
        return 0
    plotted = f"Plot: {settings.run.plot}"
    try:
        write_table(results, settings.run.table)
        plot_quality(results, settings.run.plot)
    except ImportError:
        plotted = NO_PLOT
    except OSError as error:
        say(f"error: {error}: the parts are saved; give another run.table or run.plot")
        return 1
    print(f"\nCSV: {settings.run.table}\n{plotted}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
