#!/usr/bin/env python3
"""Short dense pretraining, long fine-tuning in three ways, and what each makes of held-out text.

scripts/quickstart sets up the environment and runs this. What is already trained is not trained
again, so the same command goes on after Ctrl-C; delete runs/quickstart to start over.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from infllm_flex.config import InfLLMConfig
from infllm_flex.evaluation.by_position import (
    Bucket,
    bits_per_token,
    distant_repeats,
    doubling_buckets,
    standard_error,
)
from infllm_flex.evaluation.plot import plot_by_position
from infllm_flex.evaluation.table import format_table
from infllm_flex.strict_yaml import ConfigError, Mistake, build_dataclass, load_yaml
from infllm_flex.training.data import Corpus, held_out_windows, load_corpus
from infllm_flex.training.folder import MODEL, check_folder
from infllm_flex.training.loop import TrainingDivergedError, train
from infllm_flex.training.model import load_model
from infllm_flex.training.settings import (
    ModelSettings,
    RunSettings,
    StageSettings,
    TrainingSettings,
)
from infllm_flex.training.stages import stage_attention

SHORT, DENSE, SPARSE, WINDOW = "short, as it is", "dense", "sparse", "window only"


@dataclass(frozen=True)
class Arm:
    """A model to compare: how it was fine-tuned and is run."""

    name: str
    stage: StageSettings
    attention: InfLLMConfig


class StoppedError(Exception):
    """Ctrl-C or SIGTERM; what was trained is saved."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped and saved; the same command goes on (signal {signal})")
        self.status = 128 + signal


def main() -> int:
    """Run the command; returns its exit status."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    options = parse_arguments()
    try:
        settings = build_dataclass(TrainingSettings, load_yaml(options.config, options.overrides))
        check_folders(settings)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        quickstart(settings)
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    except (ValueError, OSError, TrainingDivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart.yaml", metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_args()


def check_folders(settings: TrainingSettings) -> None:
    """Refuse, before anything is loaded, to mix this run with one of other settings.

    Raises:
        ConfigError: A folder holds something else.
    """
    check_folder(short_run(settings), resume=True)
    pretrained = short_run(settings).run.folder / MODEL
    if pretrained.is_dir():
        for arm in arms(settings):
            check_folder(arm_run(settings, arm, pretrained), resume=True)


def short_run(settings: TrainingSettings) -> TrainingSettings:
    """The run of all stages but the last."""
    stages = dict(list(settings.stages.items())[:-1])
    if not stages:
        raise ConfigError([Mistake("", "stages", "expected a short stage before the long one")])
    return replace(settings, stages=stages, run=in_subfolder(settings, "short"))


def arms(settings: TrainingSettings) -> list[Arm]:
    """The last stage three times: same text, same order, same steps; only attention differs."""
    stage, attention = list(settings.stages.values())[-1], settings.attention
    # As few blocks as there can be: the first, the query's own and those just before it.
    window = replace(attention, topk=attention.init_blocks + 1)
    return [
        Arm(DENSE, replace(stage, attention="dense"), attention),
        Arm(SPARSE, replace(stage, attention="sparse"), attention),
        Arm(WINDOW, replace(stage, attention="sparse"), window),
    ]


def arm_run(settings: TrainingSettings, arm: Arm, pretrained: Path) -> TrainingSettings:
    """The run of one arm, from the weights of the short run."""
    name = list(settings.stages)[-1]
    return replace(
        settings,
        model=ModelSettings(path=pretrained, dtype=settings.model.dtype),
        stages={name: arm.stage},
        attention=arm.attention,
        run=in_subfolder(settings, arm.name.replace(" ", "-")),
    )


def in_subfolder(settings: TrainingSettings, name: str) -> RunSettings:
    """The same run section, one folder deeper."""
    return replace(settings.run, folder=settings.run.folder / name)


def quickstart(settings: TrainingSettings) -> None:
    """Train all, measure all, show it."""
    started = time.perf_counter()
    print(explain(settings), flush=True)
    corpus = load_corpus(settings.data)
    print(
        f"text: {len(corpus.train)} files to train on, {len(corpus.held_out)} held out\n",
        flush=True,
    )
    short = short_run(settings)
    pretrained = run_to_end(short, corpus, "1/4 short text, dense")
    models = {SHORT: (pretrained, Arm(SHORT, arms(settings)[0].stage, settings.attention))}
    for number, arm in enumerate(arms(settings), start=2):
        run = arm_run(settings, arm, pretrained)
        models[arm.name] = (run_to_end(run, corpus, f"{number}/4 long text, {arm.name}"), arm)
    windows = held_out_windows(
        corpus.held_out, arms(settings)[0].stage.max_length, settings.compare.windows
    )
    bits = {
        name: measure(model, arm, windows, settings.compare.batch_size, name)
        for name, (model, arm) in models.items()
    }
    show(settings, windows, bits)
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes in all.")


def explain(settings: TrainingSettings) -> str:
    """What will happen, in three lines."""
    short = list(short_run(settings).stages.values())[-1]
    stage, attention = arms(settings)[1].stage, settings.attention
    budget = attention.num_selected * attention.block_size
    return (
        f"Pretrain a byte-level model on {short.max_length} bytes at a time, dense; then fine-tune "
        f"it on {stage.max_length} at a time:\n"
        f"dense, sparse (a byte sees at most {budget} bytes, {budget / stage.max_length:.0%}, "
        f"chosen by InfLLM-V2) and window only (the nearest {attention.window_size} and the first "
        f"{attention.init_blocks * attention.block_size})."
    )


def run_to_end(run: TrainingSettings, corpus: Corpus, title: str) -> Path:
    """Train, or go on, until the run is complete.

    Raises:
        StoppedError: A signal came.
    """
    outcome = train(run, resume=True, corpus=corpus, title=f"{title:<28}")
    if outcome.signal:
        raise StoppedError(outcome.signal)
    assert outcome.model is not None  # a run without a signal is complete
    return outcome.model


def measure(folder: Path, arm: Arm, windows: Tensor, batch_size: int, name: str) -> Tensor:
    """Bits per byte of held-out text, with the attention the model was trained with."""
    model = load_model(folder)
    title = f"{'measuring ' + name:<28}"
    with (
        stage_attention(model, arm.stage, arm.attention),
        # disable=None: on a terminal only
        tqdm(total=len(windows), desc=title, unit="window", leave=False, disable=None) as bar,
    ):
        return bits_per_token(model, windows, batch_size, bar.update)


def show(settings: TrainingSettings, windows: Tensor, bits: dict[str, Tensor]) -> None:
    """Print the table and what to see in it; write the table, the numbers and the plot."""
    folder, attention = settings.run.folder, settings.attention
    short = list(short_run(settings).stages.values())[-1]
    buckets = doubling_buckets(windows.shape[1] - 1, short.max_length)
    repeats = distant_repeats(windows, attention.window_size + 2 * attention.block_size)
    header = ["bits per byte at", *[str(bucket) for bucket in buckets], "distant repeats"]
    rows = [
        [name, *[f"{b.mean(values):.3f}" for b in buckets], f"{values[repeats].mean():.3f}"]
        for name, values in bits.items()
    ]
    table = format_table(header, rows)
    lesson = explain_result(bits, buckets[-1], repeats)
    print(f"\nHeld-out text, {len(windows)} windows of {windows.shape[1] - 1} bytes\n\n{table}")
    print(f"\n{lesson}")
    (folder / "table.txt").write_text(f"{table}\n\n{lesson}\n")
    numbers = [dict(zip(header, row, strict=True)) for row in rows]
    (folder / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")
    plot_by_position(
        folder / "bits_by_position.png",
        bits,
        baseline=DENSE,
        smooth=64,
        title="Held-out text: bits per byte by position",
    )
    print(f"\nPlot: {folder / 'bits_by_position.png'}   Models: {folder}/*/model/")


def explain_result(bits: dict[str, Tensor], last: Bucket, repeats: Tensor) -> str:
    """What the numbers say, whichever way they came out."""
    far = {name: values[:, last.first - 1 : last.last].mean(1) for name, values in bits.items()}
    lost, error = paired(far[WINDOW], far[DENSE])
    lines = [
        f"What to see: at bytes {last} the short model is lost, as it never saw such positions.",
        f"There, seeing only the window costs {lost:+.3f} ± {error:.3f} bits per byte against",
        "dense, seeing the selected blocks {:+.3f} ± {:.3f}.".format(
            *paired(far[SPARSE], far[DENSE])
        ),
    ]
    closed = 1 - (far[SPARSE] - far[DENSE]).mean().item() / lost if lost else 0.0
    if not lost > 2 * error:
        lines.append(
            "So far the dense model itself gains nothing from afar: train longer to compare."
        )
    elif closed > 0:
        lines.append(f"Selection closes {min(closed, 1):.0%} of the gap.")
    else:
        lines.append("Selection does not help here: it does no better than the window alone.")
    marked = [f"{name} {bits[name][repeats].mean():.3f}" for name in (DENSE, SPARSE, WINDOW)]
    lines.append(
        f"Distant repeats, {int(repeats.sum())} bytes of words last seen beyond the window: "
        f"{', '.join(marked)}.\nIn so short a training a model hardly learns to copy words from "
        "afar; if these are equal, it has not."
    )
    return "\n".join(lines)


def paired(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean difference over the same windows and its standard error."""
    return (one - other).mean().item(), standard_error(one - other)


if __name__ == "__main__":
    sys.exit(main())
