"""Settings, folders and machines that cannot be used are named in one line."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings

import pytest
import torch

from tests.checkout import ROOT
from tests.evaluation.quality.command import run
from tests.evaluation.quality.tiny import settings_of, write_settings


@pytest.fixture
def refused(config, monkeypatch, capsys):
    """Return the message to overrides that the command refuses; in this process, to be quick."""
    spec = importlib.util.spec_from_file_location("quality", ROOT / "scripts/quality.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # restored after the test

    def refuse(*overrides):
        monkeypatch.setattr(sys, "argv", ["quality.py", "--config", str(config), *overrides])
        assert script.main() == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.strip().splitlines()
        return line

    return refuse


def test_what_cannot_be_used_is_said_in_one_line_before_any_work(tmp_path, refused, base):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "folder: must be a local folder" in refused("base.folder=/nowhere")
    assert "is not installed" in refused("base.folder=null", "base.package=no_such_thing")
    assert "has 1024 tokens, the model has positions for 512" in refused("tuning.length=1024")
    assert "has 700 tokens, the model has positions for 512" in refused("judge.length=700")
    assert "no file *.txt" in refused(f"text.source={empty}")
    variant = "variants.fine.selection_loss"
    assert "above 0 and at most 1000, got 0.0" in refused(f"{variant}.weight=0")
    said = refused(f"{variant}.queries=600")
    assert "variants.fine: selection_loss must have queries of at most max_length = 512" in said
    assert "left out where trained is false" in refused(
        f"{variant}.weight=1", "variants.fine.trained=false", "variants.fine.back_to_dense=false"
    )
    assert "no part matches nothing" in refused("--parts", "nothing")
    assert not (tmp_path / "run").exists()
    other = tmp_path / "other"
    other.mkdir()
    description = json.loads((base / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(description | {"model_type": "no_such_model"}))
    assert "no_such_model" in refused(f"base.folder={other}")
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "base: " in refused(f"base.folder={other}")


def test_variants_that_do_not_fit_are_named_before_any_work(tmp_path, refused):
    attention = "variants.fine.attention"
    said = refused(f"{attention}.dense_len=4096")
    assert "variants.fine: a query must see a part of the sequence, with dense_len = 4096" in said
    assert "all 512 tokens of judge.length" in said
    assert "all 512 tokens of judge.length" in refused(f"{attention}.topk=80")
    long = ("judge.length=512", "tuning.length=256")
    assert "all 256 tokens of tuning.length" in refused(*long, f"{attention}.dense_len=300")
    ruler = ("judge.groups=[ruler]", f"{attention}.dense_len=420")
    said = refused(*ruler, "judge.ruler_lengths=[512]")
    assert "all 384 tokens of judge.ruler_lengths" in said
    pooled = [f"{attention}.{name}" for name in ("pool_queries=true", "kernel_size=2")]
    said = refused(*pooled, f"{attention}.score_dims=40")
    assert said.startswith("error: variants.fine: score_dims must be less than the head dim")
    for name, value in (("tasks", "[]"), ("ruler_lengths", "[]"), ("groups", "[nats,nats]")):
        assert f"{name}: must be at least one, none twice" in refused(f"judge.{name}={value}")
    assert not (tmp_path / "run").exists()


def test_prompts_of_generation_that_are_dense_are_skipped(config):
    settings = ("judge.groups=[generation]", "variants.fine.attention.dense_len=500")
    status, out, err = run(config, *settings, "--parts", "judge:*->fine:0:generation")
    assert status == 0, err
    assert "a query of fine sees all" in err
    assert "skipped: judge:dense->fine:0:generation" in out


def test_without_tuning_a_length_and_a_variant_are_needed(tmp_path, base, texts):
    for changes, wanted in (
        ({}, "judge.length must be given"),
        ({"length": 400}, "training_free"),
    ):
        settings = settings_of(tmp_path / "run", base, texts)
        del settings["tuning"]
        settings["judge"] |= changes
        settings["variants"]["fine"]["training_free"] = not changes
        config = write_settings(tmp_path / "quality.yaml", settings)
        status, _, err = run(config)
        assert (status, len(err.splitlines())) == (2, 1)
        assert wanted in err


def test_tasks_that_do_not_fit_are_told_before_any_training(config):
    status, _, err = run(config, "judge.length=100")
    assert status == 1
    assert "step/s" not in err  # no bar of a training
    assert err.splitlines()[-1].startswith("error: judge: steps: a sequence of 101 tokens is too")
    status, _, err = run(config, "judge.questions=0")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "judge.questions: must be at least 1, got 0" in err


@pytest.mark.parametrize("name", ["table", "plot"])
def test_an_output_that_cannot_be_written_is_named_before_any_work(tmp_path, refused, name):
    assert f"run.{name} must be a file, {tmp_path} is a folder" in refused(f"run.{name}={tmp_path}")
    (tmp_path / "file").touch()
    said = refused(f"run.{name}={tmp_path / 'file' / 'more' / 'name.csv'}")
    assert f"run.{name} must lie in a folder that can be written to" in said
    assert not (tmp_path / "run").exists()


def test_a_device_without_memory_is_one_line_that_says_what_to_do(config, monkeypatch, capsys):
    import quality

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.94 GiB. GPU 0 has")

    monkeypatch.setattr(quality.Worker, "do", fail)
    monkeypatch.setattr(quality, "stop_on_signals", lambda _: None)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command replaces it
    monkeypatch.setattr(sys, "argv", ["quality.py", "--config", str(config)])
    assert quality.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: CUDA out of memory. To need less: judge.batch_size=1")


def test_a_folder_of_other_settings_is_refused(config, refused, tmp_path):
    assert run(config, "--parts", "base")[0] == 0
    said = refused("base.rope_theta=50000")
    assert "holds base with other settings (base.rope_theta: 50000.0, there null): give" in said
    said = refused("base.positions=900", "base.rope_theta=50000")
    assert "(base.rope_theta: 50000.0, there null, base.positions: 900, there null)" in said
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "file").write_text("")
    assert "holds something else" in refused(f"run.folder={tmp_path / 'strange'}")
