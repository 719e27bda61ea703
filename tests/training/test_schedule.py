"""One integer decides the stage, the samples and the learning rate of a step."""

from __future__ import annotations

import pytest

from infllm_flex.training.schedule import position_of
from tests.training.runs import stage


def test_stages_follow_one_another_and_end():
    stages = {"a": stage(steps=2), "b": stage(steps=3)}
    found = [position_of(stages, done) for done in range(6)]
    assert [(p.name, p.step) for p in found[:5]] == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
        ("b", 2),
    ]
    assert found[5] is None


def test_steps_have_different_samples():
    stages = {"a": stage(steps=4, batch_size=3)}
    indices = [i for done in range(4) for i in position_of(stages, done).sample_indices()]
    assert indices == list(range(12))


def test_the_learning_rate_warms_up_stays_and_decays_but_never_to_zero():
    stages = {"a": stage(steps=10, warmup_steps=3, decay_steps=4, learning_rate=1.0)}
    rates = [position_of(stages, done).learning_rate for done in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
