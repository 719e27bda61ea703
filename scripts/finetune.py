#!/usr/bin/env python3
"""Train or fine-tune a causal LM with the settings of a YAML file.

    scripts/finetune.py --config configs/tiny_bytes.yaml [section.key=value ...]
    torchrun --nproc-per-node 8 scripts/finetune.py --config configs/llama3_8b_64k.yaml

With torchrun's --max-restarts, a run that lost a process continues from its newest checkpoint.

Exit status: 0 success; 1 failure during the run; 2 unusable settings (nothing was loaded);
130 or 143 stopped by Ctrl-C or SIGTERM after saving, the same command with --resume continues.
torchrun's own status is 1 after any signal; --shutdown-timeout is the time it leaves for saving.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from commands.messages import show_warnings
from commands.standard_output import run_command
from infllm_flex.patch.settings import SCORING
from infllm_flex.strict_yaml import ConfigError, Node, build_dataclass, load_yaml, to_yaml
from infllm_flex.training.checkpoints import export_newest, last_step
from infllm_flex.training.collectives import RankError
from infllm_flex.training.loop import TrainingDivergedError, train
from infllm_flex.training.model_config import find_model
from infllm_flex.training.parallel import is_first_process, num_processes, was_restarted
from infllm_flex.training.preflight import dry_run
from infllm_flex.training.run_folder import CHECKPOINTS, check_folder
from infllm_flex.training.settings import TrainingSettings


def main() -> int:
    """Run the command and return its exit status."""
    options = parse_arguments()
    is_first = is_first_process()
    resume = options.resume or was_restarted()
    show_warnings(is_first)
    try:
        given = load_yaml(options.config, options.overrides)
        settings = build_dataclass(TrainingSettings, given)
        if options.export:
            return export(settings, options.export)
        if is_first:
            check_folder(settings, resume)
            warn_if_new(settings.run.folder, options.resume)
            warn_if_scored_by_default(settings, given)
    except ConfigError as error:
        if is_first:
            print(error, file=sys.stderr)
        return 2
    if is_first:
        print(to_yaml(settings) if options.print_config else plan(settings), end="", flush=True)
    if options.print_config:
        return 0
    try:
        if options.dry_run:
            processes = options.processes or num_processes()
            print(*(dry_run(settings, processes) if is_first else []), sep="\n")
            return 0
        outcome = train(settings, resume=resume, show=is_first)
    except RankError:
        return 1  # the failed process has printed the reason
    except (ValueError, OSError, TrainingDivergedError) as error:
        # Every process raises the same error, except for an OSError.
        if is_first or isinstance(error, OSError):
            print(f"error: {error}", file=sys.stderr)
        return 1
    if is_first:
        where = outcome.model or outcome.checkpoint
        kind = "model" if outcome.model else "checkpoint"
        print(f"{outcome.step} of {settings.total_steps} steps done; {kind} in {where}")
    return 128 + outcome.signal if outcome.signal else 0


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FOLDER",
        help="export the run's newest checkpoint as a model folder and stop",
    )
    parser.add_argument("--print-config", action="store_true", help="print all settings and stop")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, model and text, estimate the memory, and stop",
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="with --dry-run: assume N processes"
    )
    options = parser.parse_intermixed_args()
    if options.processes is not None and not options.dry_run:
        parser.error("--processes needs --dry-run: torchrun sets the number of processes of a run")
    if options.processes is not None and options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    return options


def warn_if_scored_by_default(settings: TrainingSettings, given: Node) -> None:
    """Warn if the settings of a pretrained model do not say how blocks are scored.

    Args:
        settings: The settings.
        given: The document that they were built from.
    """
    named = given.entries["attention"].entries if "attention" in given.entries else {}
    is_sparse = any(stage.attention == "sparse" for stage in settings.stages.values())
    if is_sparse and settings.model.tiny is None and not any(name in named for name in SCORING):
        warnings.warn(
            "attention: does not say how blocks are scored: means of 32 keys are, as in released "
            "MiniCPM checkpoints. Models trained with dense attention answer more when every key "
            "is, which patch_model(model) takes for them (docs/choosing-settings.md). Name "
            "kernel_size, kernel_stride and pool_queries",
            stacklevel=2,
        )


def export(settings: TrainingSettings, target: Path) -> int:
    """Export the newest checkpoint as a model folder; returns the exit status."""
    try:
        origin = find_model(settings).model.path
        export_newest(settings.run.folder / CHECKPOINTS, target, origin)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"model in {target}")
    return 0


def warn_if_new(folder: Path, resume: bool) -> None:
    """Warn if there is nothing to resume, because the folder may be another than was meant."""
    if resume and last_step(folder / CHECKPOINTS) < 1:
        warnings.warn(f"{folder} holds no step to resume: the run begins anew", stacklevel=2)


def plan(settings: TrainingSettings) -> str:
    """Describe the run, one line per stage."""
    attention = settings.attention
    lines = []
    for name, stage in settings.stages.items():
        line = (
            f"{name}: {stage.steps} steps of {stage.batch_size} x {stage.max_length} tokens, "
            f"{stage.attention}"
        )
        if stage.attention == "sparse" and not attention.is_dense(stage.max_length):
            visible = attention.max_visible(stage.max_length)
            line += (
                f" (a query attends to at most {visible} tokens, {visible / stage.max_length:.0%})"
            )
        lines.append(line + "\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
