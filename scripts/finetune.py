#!/usr/bin/env python3
"""Train or fine-tune a causal LM as a YAML file says.

    scripts/finetune.py --config configs/tiny_bytes.yaml [section.key=value ...]
    torchrun --nproc-per-node 8 scripts/finetune.py --config configs/llama3_8b_64k.yaml

With torchrun's --max-restarts a run that lost a process goes on from its newest checkpoint.

Exit status: 0 done, 1 failed on the way, 2 settings that cannot be used (nothing was loaded),
130 or 143 stopped by Ctrl-C or SIGTERM after saving; the same command with --resume goes on.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from infllm_flex.strict_yaml import ConfigError, build_dataclass, load_yaml, to_yaml
from infllm_flex.training.checkpoints import export_newest
from infllm_flex.training.collectives import RankError
from infllm_flex.training.loop import TrainingDivergedError, train
from infllm_flex.training.model_config import find_model
from infllm_flex.training.parallel import is_first_process, num_processes, was_restarted
from infllm_flex.training.preflight import rehearse
from infllm_flex.training.run_folder import CHECKPOINTS, check_folder
from infllm_flex.training.settings import TrainingSettings


def main() -> int:
    """Run the command; returns its exit status."""
    options = parse_arguments()
    first = is_first_process()
    warnings.showwarning = show_warning if first else ignore_warning
    try:
        settings = build_dataclass(TrainingSettings, load_yaml(options.config, options.overrides))
        if options.export:
            return export(settings, options.export)
        if first:
            check_folder(settings, options.resume or was_restarted())
    except ConfigError as error:
        if first:
            print(error, file=sys.stderr)
        return 2
    if first:
        print(to_yaml(settings) if options.print_config else plan(settings), end="", flush=True)
    if options.print_config:
        return 0
    try:
        if options.dry_run:
            processes = options.processes or num_processes()
            print(*(rehearse(settings, processes) if first else []), sep="\n")
            return 0
        outcome = train(settings, resume=options.resume or was_restarted(), show=first)
    except RankError:
        return 1  # the process that failed has said why
    except (ValueError, OSError, TrainingDivergedError) as error:
        if first or isinstance(error, OSError):  # of the others, all have the same
            print(f"error: {error}", file=sys.stderr)
        return 1
    if first:
        where = outcome.model or outcome.checkpoint
        kind = "model" if outcome.model else "checkpoint"
        print(f"{outcome.step} of {settings.total_steps} steps done; {kind} in {where}")
    return 128 + outcome.signal if outcome.signal else 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FOLDER",
        help="write the run's newest checkpoint as a model folder and stop",
    )
    parser.add_argument("--print-config", action="store_true", help="show all settings and stop")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, model and text, estimate the memory needed, and stop",
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="with --dry-run: as if torchrun started N"
    )
    return parser.parse_args()


def export(settings: TrainingSettings, target: Path) -> int:
    """Write the newest checkpoint as a model folder; returns the exit status."""
    try:
        origin = find_model(settings).model.path
        export_newest(settings.run.folder / CHECKPOINTS, target, origin)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"model in {target}")
    return 0


def plan(settings: TrainingSettings) -> str:
    """What the run will do, one line per stage."""
    attention = settings.attention
    lines = []
    for name, stage in settings.stages.items():
        line = (
            f"{name}: {stage.steps} steps of {stage.batch_size} x {stage.max_length} tokens, "
            f"{stage.attention}"
        )
        if stage.attention == "sparse" and not attention.is_dense(stage.max_length):
            budget = attention.num_selected * attention.block_size
            line += f" (a query sees at most {budget} = {budget / stage.max_length:.0%})"
        lines.append(line + "\n")
    return "".join(lines)


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as one line, without the line of code it came from."""
    print(f"warning: {message}", file=sys.stderr)


def ignore_warning(*_: object, **__: object) -> None:
    """Leave warnings to the first process: all have the same."""


if __name__ == "__main__":
    sys.exit(main())
