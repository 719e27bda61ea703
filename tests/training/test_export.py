"""A checkpoint is exported as a model folder that transformers reads."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from infllm_flex.training import checkpoints
from infllm_flex.training.checkpoints import export, export_newest, exporting
from infllm_flex.training.loop import train
from infllm_flex.training.model import load_model
from infllm_flex.training.settings import CheckpointSettings, ModelSettings
from tests.training.runs import settings, stage, weights_hash

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, texts):
    """A finished run of four steps with a checkpoint after each."""
    run = settings(
        tmp_path_factory.mktemp("trained") / "run",
        texts,
        stages={"only": stage(steps=4)},
        checkpoint=CheckpointSettings(every=1, keep=9),
    )
    train(run, show=False)
    return run


@pytest.fixture
def checkpoint(trained):
    return checkpoints.newest(trained.run.folder / "checkpoints")


def test_every_checkpoint_exports_the_model_of_its_step(trained, checkpoint, tmp_path, texts):
    early = export(checkpoint.with_name("step-00000002"), tmp_path / "early")
    straight = settings(tmp_path / "run", texts, stages={"only": stage(steps=2)})
    assert weights_hash(early) == weights_hash(train(straight, show=False).model)
    assert weights_hash(export(checkpoint, tmp_path / "last")) == weights_hash(
        trained.run.folder / "model"
    )


def test_a_model_in_several_files_is_the_same_model(trained, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_FILE_BYTES", 10_000)
    model = export(checkpoint, tmp_path / "model")
    files = sorted(path.name for path in model.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    ours, theirs = (
        load_model(folder).state_dict() for folder in (model, trained.run.folder / "model")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)


def test_the_tokenizer_of_the_original_model_is_copied(trained, checkpoint, tmp_path):
    origin = tmp_path / "origin"
    origin.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "code.py"):
        (origin / name).write_text("{}")
    model = export_newest(checkpoint.parent, tmp_path / "model", origin)
    copied = {path.name for path in model.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= copied
    assert "code.py" not in copied


def test_an_export_is_replaced_and_other_folders_are_refused(checkpoint, tmp_path):
    model = export(checkpoint.with_name("step-00000001"), tmp_path / "model")
    first = weights_hash(model)
    assert weights_hash(export(checkpoint, tmp_path / "model")) != first
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "model.safetensors").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"thesis holds other files \(model\.safetensors\): move"
    ):
        export(checkpoint, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "model.safetensors").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["model", "thesis"]


def test_a_full_disk_leaves_the_previous_export(checkpoint, tmp_path, monkeypatch):
    before = weights_hash(export(checkpoint.with_name("step-00000001"), tmp_path / "model"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export(checkpoint, tmp_path / "model")
    assert weights_hash(tmp_path / "model") == before
    assert os.listdir(tmp_path) == ["model"]


def test_a_finished_run_that_lost_its_model_exports_it_again(tmp_path, texts):
    run = settings(tmp_path / "run", texts, stages={"only": stage(steps=2)})
    model = train(run, show=False).model
    expected = weights_hash(model)
    (model / "model.safetensors").write_bytes(b"damaged")
    assert train(run, resume=True, show=False).model == model
    assert weights_hash(model) == expected


def test_files_that_a_user_adds_to_a_model_are_never_lost(checkpoint, tmp_path, texts):
    model = export(checkpoint.with_name("step-00000001"), tmp_path / "model")
    (model / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"model holds other files \(README\.md\): move"):
        export(checkpoint, model)
    run = settings(tmp_path / "run", texts, stages={"only": stage(steps=2)})
    model = train(run, show=False).model
    (model / "README.md").write_text("mine")
    assert train(run, resume=True, show=False).model == model
    assert (model / "README.md").read_text() == "mine"


def test_training_continues_from_an_exported_model(trained, tmp_path, texts):
    run = settings(
        tmp_path / "run",
        texts,
        model=ModelSettings(path=trained.run.folder / "model"),
        stages={"only": stage(steps=1)},
    )
    assert train(run, show=False).step == 1


def test_the_command_exports_the_newest_undamaged_checkpoint(trained, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    assert command.export(trained, tmp_path / "model") == 0
    assert capsys.readouterr().out == f"model in {tmp_path / 'model'}\n"
    assert weights_hash(tmp_path / "model") == weights_hash(trained.run.folder / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    assert command.export(trained, tmp_path / "other") == 1
    assert "other holds other files" in capsys.readouterr().err


def test_without_a_checkpoint_there_is_nothing_to_export(tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match="there is no checkpoint to export"):
        export_newest(tmp_path, tmp_path / "model")
