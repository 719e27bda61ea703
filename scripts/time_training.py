#!/usr/bin/env python3
"""Measure the seconds of a batch, a training step and a checkpoint of a run's first stage.

    scripts/time_training.py --config configs/tiny_bytes.yaml [section.key=value ...]

Batches should take at most a fifth of a step; with the default ``checkpoint.every`` of 500 steps,
checkpoints should take at most 2 % of the time of the steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from commands.standard_output import run_command
from infllm_flex.strict_yaml import build_dataclass, load_yaml
from infllm_flex.training.data import batches, open_text
from infllm_flex.training.model_config import find_model
from infllm_flex.training.parallel import open_world
from infllm_flex.training.schedule import position_of
from infllm_flex.training.settings import TrainingSettings
from infllm_flex.training.stage_attention import stage_attention
from infllm_flex.training.state import TrainingState
from infllm_flex.training.step import take_step

_BATCHES = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--repeats", type=int, default=3, help="measurements, of which the smallest is shown"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        document = load_yaml(options.config, options.overrides)
        settings = find_model(build_dataclass(TrainingSettings, document))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        for name, seconds in measure(settings, Path(folder), options.repeats).items():
            print(f"{name}: {seconds:.4g} s")
    return 0


def measure(settings: TrainingSettings, folder: Path, repeats: int) -> dict[str, float]:
    """Seconds by name, for the first stage of a run."""
    name, stage = next(iter(settings.stages.items()))
    text = open_text(settings.data, folder / "data", settings.model.path)
    steps = batches(text.sampler(name, stage, seed=0), stage.batch_size, 0, _BATCHES + 1)
    batch = next(steps)
    seconds = {"batch": _seconds(lambda: list(steps), 1) / _BATCHES}
    position = position_of(settings.stages, 1)
    assert position is not None  # a stage has at least one step
    with open_world(settings) as world:
        state = TrainingState(settings, folder / "checkpoints", text, world)
        with stage_attention(state.model, stage, settings.attention, world) as attention:

            def step() -> None:
                take_step(state, world, batch, position, attention)

            step()
            seconds["step"] = _seconds(step, repeats)

        def save() -> None:
            state.done += 1
            state.save()

        seconds["checkpoint"] = _seconds(save, repeats)
    return seconds


def _seconds(action: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    sys.exit(run_command(main))
