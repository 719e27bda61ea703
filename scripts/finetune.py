#!/usr/bin/env python3
"""Train or fine-tune a causal LM as a YAML file says.

    scripts/finetune.py --config configs/quickstart.yaml [section.key=value ...]

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
from infllm_flex.training.folder import CHECKPOINTS, check_folder
from infllm_flex.training.loop import TrainingDivergedError, train
from infllm_flex.training.settings import TrainingSettings


def main() -> int:
    """Run the command; returns its exit status."""
    options = parse_arguments()
    warnings.showwarning = show_warning
    try:
        settings = build_dataclass(TrainingSettings, load_yaml(options.config, options.overrides))
        if options.export:
            return export(settings, options.export)
        check_folder(settings, options.resume)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if options.print_config:
        print(to_yaml(settings), end="")
        return 0
    print(plan(settings))
    if options.dry_run:
        return 0
    try:
        outcome = train(settings, resume=options.resume)
    except (ValueError, OSError, TrainingDivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    where = f"model in {outcome.model}" if outcome.model else f"checkpoint in {outcome.checkpoint}"
    print(f"{outcome.step} of {settings.total_steps} steps done; {where}")
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
    parser.add_argument("--dry-run", action="store_true", help="check all settings and stop")
    return parser.parse_args()


def export(settings: TrainingSettings, target: Path) -> int:
    """Write the newest checkpoint as a model folder; returns the exit status."""
    try:
        export_newest(settings.run.folder / CHECKPOINTS, target, settings.model.path)
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
        lines.append(line)
    return "\n".join(lines)


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as one line, without the line of code it came from."""
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
