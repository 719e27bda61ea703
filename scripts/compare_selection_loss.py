#!/usr/bin/env python3
"""Compare training with and without a loss for the selection, on the tiny task of the quickstart.

A tiny model learns keys and values in short sequences. From the same weights it then learns long
ones, on the same samples, with dense or sparse attention and with several weights of the loss. The
scores of blocks are means of 32 keys, with which sparse attention misses most facts. Each model
answers questions about facts outside the window. Finished parts are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarking.environment import describe_environment
from commands.outputs import check_output
from commands.standard_output import run_command
from evaluation.saved_results import Result, read_result, write_result
from evaluation.table import format_table
from evaluation.tiny_task import SEQUENCES, ask, counts, finish, share, write_csv
from infllm_flex.strict_yaml import ConfigError, build_dataclass, load_yaml
from infllm_flex.training.model import load_model
from infllm_flex.training.run_folder import MODEL
from infllm_flex.training.settings import (
    ModelSettings,
    SelectionLossSettings,
    StageSettings,
    TrainingSettings,
)
from infllm_flex.training.stage_attention import stage_attention


@dataclass(frozen=True)
class Arm:
    """A training on long sequences.

    Attributes:
        tuned: Attention in training.
        weight: Weight of the selection loss; 0: none.
    """

    tuned: Literal["dense", "sparse"]
    weight: float

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"{self.tuned}, weight {self.weight:g}" if self.weight else f"{self.tuned}, without"


ARMS = [
    *(Arm("dense", 0.0), Arm("dense", 1.0), Arm("dense", 10.0)),
    *(Arm("sparse", 0.0), Arm("sparse", 10.0)),
]


def main() -> int:
    """Run the command and return its exit status."""
    warnings.simplefilter("ignore")
    options = parse_arguments()
    try:
        settings = build_dataclass(TrainingSettings, load_yaml(options.config, options.overrides))
        check_output("--table", options.table)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = {
        (arm, seed): result
        for seed in options.seeds
        for arm, result in judge_seed(settings, seed, options.queries)
    }
    print(table(found, options.seeds))
    write_rows(options.table, found, options.queries)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/selection_loss_tiny.yaml", metavar="FILE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--queries", type=int, default=512, metavar="N", help="of a sequence")
    parser.add_argument("--table", type=Path, required=True, metavar="CSV")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    if len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds must name no seed twice, got {options.seeds}")
    return options


def judge_seed(settings: TrainingSettings, seed: int, queries: int) -> Iterator[tuple[Arm, Result]]:
    """Train and judge every arm of a seed.

    Raises:
        SystemExit: A signal stopped a training, which is saved.
    """
    folder = settings.run.folder / str(seed)
    (short, short_stage), (long, long_stage) = settings.stages.items()
    place = replace(settings.run, folder=folder / "short", seed=seed)
    finish(replace(settings, run=place, stages={short: short_stage}), f"{seed} {short}")
    trained = ModelSettings(path=folder / "short" / MODEL, dtype=settings.model.dtype)
    for arm in ARMS:
        loss = SelectionLossSettings(weight=arm.weight, queries=queries) if arm.weight else None
        stage = replace(long_stage, attention=arm.tuned, selection_loss=loss)
        place = replace(settings.run, folder=folder / arm.name.replace(", ", "-"), seed=seed)
        run = replace(settings, run=place, model=trained, stages={long: stage})
        about = {"arm": repr(arm), "stage": repr(stage), "sequences": SEQUENCES}
        saved = place.folder / "result.json"
        result = read_result(saved, about)
        if result is None:
            finish(run, f"{seed} {arm.name}")
            result = write_result(saved, about, partial(judge, run, stage))
        yield arm, result


@torch.no_grad()
def judge(run: TrainingSettings, stage: StageSettings) -> Result:
    """Ask a trained model about facts outside the window, with sparse and with dense attention."""
    folder = run.run.folder
    model = load_model(folder / MODEL).eval()
    beyond = run.attention.window_size + run.attention.block_size
    found: Result = {}
    for attention in ("sparse", "dense"):
        with stage_attention(
            model, replace(stage, attention=attention, selection_loss=None), run.attention
        ):
            found[attention], found["asked"] = ask(model, stage.max_length, beyond)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return found | {"selection_loss": last.get("selection_loss")}


def table(found: dict[tuple[Arm, int], Result], seeds: list[int]) -> str:
    """Make the table: correct answers with 95 % intervals over seeds and sequences."""
    rows = []
    for arm in ARMS:
        results = [found[arm, seed] for seed in seeds]
        cells = [arm.name]
        for attention in ("sparse", "dense"):
            cells.append(share(results, attention))
        rows.append(cells)
    return format_table(["tuned", "sparse", "dense"], rows)


def write_rows(path: Path, found: dict[tuple[Arm, int], Result], queries: int) -> None:
    """Write a row for every model and kind of attention."""
    environment = describe_environment(torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    for ((arm, seed), result), run in itertools.product(found.items(), ("sparse", "dense")):
        rows.append(
            {
                "tuned": arm.tuned,
                "weight": arm.weight,
                "queries": queries if arm.weight else 0,
                "run": run,
                "seed": seed,
                **counts(result, run),
                "selection_loss": result["selection_loss"] if arm.weight else "",
                **environment,
            }
        )
    write_csv(path, rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
