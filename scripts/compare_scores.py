#!/usr/bin/env python3
"""Compare how blocks are scored, for several numbers of query heads per key/value head.

Tiny models learn keys and values in short sequences, then in long ones: densely, with every key
scored, in all head dims or in a quarter of them, and with means of 32 keys scored. Each answers
questions about facts outside the window. The densely tuned one attends in every mode, and as a
control to the nearest tokens alone. Parts that are finished are not repeated.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarking.environment import describe_environment
from benchmarking.settings import Heads
from commands.outputs import check_output
from commands.standard_output import run_command
from evaluation.controls import window_only
from evaluation.saved_results import Result, read_result, write_result
from evaluation.table import format_table
from evaluation.tiny_task import SEQUENCES, ask, counts, finish, share, write_csv
from infllm_flex.config import InfLLMConfig
from infllm_flex.strict_yaml import ConfigError, build_dataclass, load_yaml
from infllm_flex.training.model import load_model
from infllm_flex.training.run_folder import MODEL
from infllm_flex.training.settings import ModelSettings, TinyModelSettings, TrainingSettings
from infllm_flex.training.stage_attention import stage_attention

DENSE, MEANS, WINDOW = "dense", "means of 32", "window only"
EVERY_KEY, PART = "every key", "every key, 1/4 of dims"
RUNS = {
    DENSE: (DENSE, EVERY_KEY, PART, MEANS, WINDOW),
    EVERY_KEY: (EVERY_KEY,),
    PART: (PART,),
    MEANS: (MEANS,),
}


@dataclass(frozen=True, order=True)
class Model:
    """A model that is trained and judged.

    Attributes:
        heads: Query heads and key/value heads.
        seed: Seed of weights and samples.
        tuned: Attention in training on long sequences.
    """

    heads: Heads
    seed: int
    tuned: str


def main() -> int:
    """Run the command and return its exit status."""
    warnings.simplefilter("ignore")
    options = parse_arguments()
    try:
        settings = build_dataclass(TrainingSettings, load_yaml(options.config, options.overrides))
        tiny_sizes(settings)
        check_output("--table", options.table)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = {
        model: result
        for heads in options.heads
        for seed in options.seeds
        for model, result in judge_models(settings, heads, seed)
    }
    print(table(found))
    write_rows(options.table, found)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/scores_tiny.yaml", metavar="FILE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument(
        "--heads",
        type=pair,
        nargs="+",
        default=[Heads(4, 4), Heads(4, 1), Heads(16, 1)],
        metavar="Q/KV",
        help="query heads and key/value heads, such as 16/1",
    )
    parser.add_argument("--table", type=Path, required=True, metavar="CSV")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    if len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds must name no seed twice, got {options.seeds}")
    return options


def pair(text: str) -> Heads:
    """Read a pair such as ``16/1`` for argparse, which shows an ArgumentTypeError's own words."""
    try:
        return Heads.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected a pair such as 16/1, the first a multiple of the second, got {text}"
        ) from error


class TinySizes(NamedTuple):
    """The sizes of the models that are trained, but for their heads."""

    model: TinyModelSettings
    head_dim: int


def tiny_sizes(settings: TrainingSettings) -> TinySizes:
    """Return the sizes.

    Raises:
        ValueError: They do not suit the comparison.
    """
    tiny = settings.model.tiny
    if tiny is None or tiny.head_dim is None or tiny.head_dim % 16:
        found = None if tiny is None else tiny.head_dim
        raise ValueError(
            "model.tiny.head_dim must be a multiple of 16: the script sets the heads of new models "
            f"and scores a quarter of their dims, got {found}"
        )
    return TinySizes(tiny, tiny.head_dim)


def attentions(settings: TrainingSettings) -> dict[str, InfLLMConfig]:
    """Return the sparse attentions by name; all see as many tokens."""
    common, head_dim = settings.attention, tiny_sizes(settings).head_dim
    every_key = replace(common, kernel_size=1, kernel_stride=1, pool_queries=True)
    return {
        EVERY_KEY: every_key,
        PART: replace(every_key, score_dims=head_dim // 4),
        MEANS: replace(common, kernel_size=32, kernel_stride=16),
        WINDOW: window_only(common),
    }


def folder_name(tuned: str) -> str:
    """Return a name of letters, digits and ``_``."""
    return re.sub(r"\W+", "_", tuned)


def judge_models(
    settings: TrainingSettings, heads: Heads, seed: int
) -> Iterator[tuple[Model, Result]]:
    """Train and judge the models of one shape and seed."""
    sizes = replace(tiny_sizes(settings).model, num_heads=heads.query, num_kv_heads=heads.kv)
    folder = settings.run.folder / f"{heads.query}-{heads.kv}" / str(seed)
    (short, short_stage), (long, long_stage) = settings.stages.items()
    place = replace(settings.run, folder=folder / "short", seed=seed)
    first = replace(
        settings, run=place, model=replace(settings.model, tiny=sizes), stages={short: short_stage}
    )
    title = f"{heads} {seed}"
    finish(first, f"{title} {short}")
    trained = ModelSettings(path=folder / "short" / MODEL, dtype=settings.model.dtype)
    for tuned, modes in RUNS.items():
        stage = replace(long_stage, attention="dense" if tuned == DENSE else "sparse")
        run = replace(
            settings,
            run=replace(settings.run, folder=folder / folder_name(tuned), seed=seed),
            model=trained,
            attention=attentions(settings).get(tuned, settings.attention),
            stages={long: stage},
        )
        about: Result = {"stage": repr(stage), "attention": repr(run.attention)}
        about |= {"modes": modes, "sequences": SEQUENCES}
        saved = run.run.folder / "result.json"
        result = read_result(saved, about)
        if result is None:
            finish(run, f"{title} {tuned}")
            result = write_result(saved, about, partial(judge, settings, run, modes))
        yield Model(heads, seed, tuned), result


@torch.no_grad()
def judge(settings: TrainingSettings, run: TrainingSettings, modes: tuple[str, ...]) -> Result:
    """Ask a trained model about facts outside the window, in several attention modes."""
    (stage,) = run.stages.values()
    model = load_model(run.run.folder / MODEL).eval()
    sparse = attentions(settings)
    # The widest window decides which facts are asked about, so that all answer the same questions.
    beyond = max(x.window_size for x in sparse.values()) + settings.attention.block_size
    found: Result = {}
    for mode in modes:
        as_run = replace(stage, attention="dense" if mode == DENSE else "sparse")
        with stage_attention(model, as_run, sparse.get(mode, settings.attention)):
            found[mode], found["asked"] = ask(model, stage.max_length, beyond)
    return found


def table(found: dict[Model, Result]) -> str:
    """Make the table: right answers with 95 % intervals over seeds and sequences."""
    shapes = list(dict.fromkeys(model.heads for model in found))
    rows = []
    for tuned, modes in RUNS.items():
        for mode in modes:
            cells = [tuned, mode]
            for heads in shapes:
                results = [r for m, r in found.items() if m.heads == heads and m.tuned == tuned]
                cells.append(share(results, mode))
            rows.append(cells)
    return format_table(["tuned", "attends", *map(str, shapes)], rows)


def write_rows(path: Path, found: dict[Model, Result]) -> None:
    """Write a row for every model and attention mode."""
    environment = describe_environment(torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    for model, result in found.items():
        for mode in RUNS[model.tuned]:
            row = {
                "Hq": model.heads.query,
                "Hkv": model.heads.kv,
                "tuned": model.tuned,
                "run": mode,
            }
            rows.append(row | {"seed": model.seed} | counts(result, mode) | environment)
    write_csv(path, rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
