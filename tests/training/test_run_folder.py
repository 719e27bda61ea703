"""A run refuses the folder of another run, and a second process in its own."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest

from infllm_flex.strict_yaml import ConfigError, build_dataclass, load_yaml
from infllm_flex.training import loop
from infllm_flex.training.data import WindowSampler
from infllm_flex.training.loop import train
from infllm_flex.training.settings import (
    ModelSettings,
    OptimSettings,
    TrainingSettings,
)
from tests.training.runs import (
    TINY,
    metrics,
    settings,
    stage,
    weights_hash,
)


def test_a_folder_with_another_run_or_other_files_is_refused_before_any_work(tmp_path, texts):
    run = settings(tmp_path / "run", texts)
    train(run, show=False)
    with pytest.raises(ConfigError, match=r"already holds a run: add --resume"):
        train(run, show=False)
    other = replace(run, run=replace(run.run, seed=1), optim=OptimSettings(weight_decay=0.0))
    with pytest.raises(ConfigError, match=r"different settings \(optim, run\.seed\): "):
        train(other, resume=True, show=False)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"holds other files \(thesis\.tex\)"):
        train(settings(tmp_path / "thesis", texts), show=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file, expected a folder"):
        train(settings(tmp_path / "file", texts), show=False)
    assert os.listdir(tmp_path / "thesis") == ["thesis.tex"]


def test_a_run_is_not_resumed_with_its_stages_in_another_order(tmp_path, texts):
    stages = {"a": stage(), "b": stage(), "c": stage(steps=2)}
    run = settings(tmp_path / "run", texts, stages=stages)
    train(run, show=False)
    other = replace(run, stages={name: stages[name] for name in ("a", "c", "b")})
    with pytest.raises(ConfigError, match=r"different settings \(the order of stages\): "):
        train(other, resume=True, show=False)


def fails_before_its_first_step(run, patch):
    """Fail until the settings are corrected; here the learning rate is wrong."""

    def batch(self, indices):
        raise ValueError("no memory")

    patch.setattr(WindowSampler, "batch", batch)
    with pytest.raises(ValueError, match="no memory"):
        train(run, show=False)


def is_stopped_before_its_first_step(run, patch):
    real = loop._Trainer.run

    def run_after_signal(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    patch.setattr(loop._Trainer, "run", run_after_signal)
    assert train(run, show=False).step == 0


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("end", [fails_before_its_first_step, is_stopped_before_its_first_step])
def test_a_folder_without_a_finished_step_accepts_corrected_settings(tmp_path, texts, end, resume):
    wrong = settings(tmp_path / "run", texts, model=ModelSettings(tiny=replace(TINY, num_layers=1)))
    right = settings(tmp_path / "run", texts)
    expected = train(settings(tmp_path / "fresh", texts), show=False)
    with pytest.MonkeyPatch.context() as patch:
        end(wrong, patch)
    (tmp_path / "run" / "run.yaml.tmp").write_text("written half when the power failed")
    outcome = train(right, resume=resume, show=False)
    assert weights_hash(outcome.model) == weights_hash(expected.model)
    kept = build_dataclass(TrainingSettings, load_yaml(tmp_path / "run" / "run.yaml"))
    assert kept == right


def test_a_step_without_a_checkpoint_keeps_its_folder(tmp_path, texts, monkeypatch):
    run = settings(tmp_path / "run", texts)
    real, calls = WindowSampler.batch, iter(range(1, 100))

    def batch(self, indices):
        if next(calls) == 3:
            raise ValueError("no memory")
        return real(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(WindowSampler, "batch", batch)
        with pytest.raises(ValueError, match="no memory"):
            train(run, show=False)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    with pytest.raises(ConfigError, match="already holds a run"):
        train(run, show=False)
    with pytest.raises(
        ConfigError, match=r"different settings \(optim\): .*; for a new run, choose another"
    ):
        train(replace(run, optim=OptimSettings(weight_decay=0.0)), resume=True, show=False)
    assert [line["step"] for line in metrics(run)] == [1, 2]


def test_two_runs_cannot_use_a_folder_at_once(tmp_path, texts, monkeypatch):
    run = settings(tmp_path / "run", texts)
    real = WindowSampler.batch

    def batch(self, indices):
        with pytest.raises(ConfigError, match="is in use by another process"):
            train(run, resume=True, show=False)
        return real(self, indices)

    monkeypatch.setattr(WindowSampler, "batch", batch)
    train(run, show=False)
