"""What training promises in numbers, at the size of a tiny byte-level model."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from infllm_flex.strict_yaml import build_dataclass, load_yaml
from infllm_flex.training.data import batches, open_text
from infllm_flex.training.parallel import open_world
from infllm_flex.training.schedule import position_of
from infllm_flex.training.settings import CheckpointSettings, TrainingSettings
from infllm_flex.training.state import TrainingState
from infllm_flex.training.step import take_step

CONFIG = Path(__file__).parents[2] / "configs" / "tiny_bytes.yaml"


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Seconds of: making a step's batch by each packing, a step, and saving."""
    folder = tmp_path_factory.mktemp("figures")
    run = build_dataclass(TrainingSettings, load_yaml(CONFIG))
    stage = next(iter(run.stages.values()))
    found = {}
    for packing in ("stream", "documents"):
        data = replace(run.data, packing=packing, pattern="*.py")
        text = open_text(data, folder / "data")
        sampler = text.sampler("a", stage, seed=0)
        steps = batches(sampler, stage.batch_size, 0, 101)
        batch = next(steps)
        found[packing] = seconds(lambda steps=steps: list(steps)) / 100
    with open_world(run) as world:
        state = TrainingState(run, folder / "checkpoints", text, world)

        def step():
            take_step(state, world, batch, position_of(run.stages, 1))

        step()
        found["step"] = min(seconds(step) for _ in range(3))

        def save():
            state.done += 1
            state.save()

        found["save"] = min(seconds(save) for _ in range(3))
    return found


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_batches_are_made_five_times_faster_than_the_model_consumes_them(measured, packing):
    assert 5 * measured[packing] < measured["step"]


def test_saving_at_the_default_interval_takes_two_percent_of_the_time_at_most(measured):
    assert measured["save"] < 0.02 * CheckpointSettings().every * measured["step"]
