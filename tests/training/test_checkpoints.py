"""A checkpoint is complete or absent, whatever happens while it is written or kept."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infllm_flex.training import checkpoints, manifest
from infllm_flex.training.checkpoints import Checkpoint, CheckpointError


def checkpoint(step: int, **changes: Any) -> Checkpoint:
    values: dict[str, Any] = {
        "step": step,
        "text_identity": "of all",
        "weights": {"w": torch.full((3, 5), float(step)), "transposed": torch.rand(4, 6).T},
        "optimizer": {"0.0.exp_avg": torch.rand(3, 5), "0.0.step": torch.tensor(float(step))},
        "random_state": {"cpu": torch.get_rng_state()},
        "config_json": "{}\n",
    }
    return Checkpoint(**(values | changes))


def load(path: Path, like: Checkpoint) -> Checkpoint:
    """Load a checkpoint into new tensors with the shapes of ``like``."""
    parts = {
        name: {key: torch.zeros_like(value) for key, value in getattr(like, name).items()}
        for name in ("weights", "optimizer", "random_state")
    }
    assert checkpoints.load(path, **parts)
    state = checkpoints.read_state(path)
    return replace(like, step=state.step, text_identity=state.text_identity, **parts)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class PowerCut(BaseException):
    pass


def test_a_checkpoint_loads_bit_for_bit(tmp_path):
    saved = checkpoint(7)
    path = checkpoints.save(tmp_path, saved, keep=2)
    assert checkpoints.newest(tmp_path) == path == tmp_path / "step-00000007"
    found = load(path, saved)
    assert (found.step, found.text_identity) == (7, "of all")
    assert (path / "config.json").read_text() == saved.config_json
    for part in ("weights", "optimizer", "random_state"):
        ours, theirs = getattr(found, part), getattr(saved, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 10, 11):
        checkpoints.save(tmp_path, checkpoint(step), keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000011"]


def test_without_checkpoints_there_is_nothing_to_resume_from(tmp_path):
    assert checkpoints.newest(tmp_path) is None
    assert checkpoints.newest(tmp_path / "gone") is None


def test_a_power_cut_at_any_moment_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch):
    """For every n, stop at the n-th call that changes the disk, until one save completes."""
    real_rmtree = shutil.rmtree
    for cut in range(1, 100):
        folder = tmp_path / str(cut)
        checkpoints.save(folder, checkpoint(1), keep=2)
        calls = 0

        def counted(real):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls >= cut:  # noqa: B023 - used within the round only
                    raise PowerCut  # later calls fail too
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for module, name in [(os, "fsync"), (os, "rename"), (os, "open"), (os, "close")]:
                patch.setattr(module, name, counted(getattr(module, name)))
            patch.setattr(Path, "write_text", counted(Path.write_text))
            patch.setattr(Path, "mkdir", counted(Path.mkdir))
            patch.setattr(shutil, "rmtree", counted(real_rmtree))
            try:
                checkpoints.save(folder, checkpoint(2), keep=2)
                completed = True
            except PowerCut:
                completed = False
        found = checkpoints.newest(folder)
        assert found is not None
        step = checkpoints.read_state(found).step
        assert step in (1, 2)
        checkpoints.clear(folder)
        resumed = checkpoints.save(folder, checkpoint(3), keep=2)
        assert checkpoints.newest(folder) == resumed
        assert not [name for name in names(folder) if name.startswith(".")]
        if completed:
            assert step == 2
            return
    pytest.fail("no save completed")


def test_all_files_are_flushed_before_the_folder_is_renamed(tmp_path, monkeypatch):
    """A power cut loses data that was not flushed."""
    synced: set[int] = set()
    renamed = []
    fsync, rename = os.fsync, os.rename

    def note(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(source, target):
        if Path(target).name.startswith("step-"):
            parts = [Path(source), *Path(source).iterdir()]
            assert {path.stat().st_ino for path in parts} <= synced
            synced.clear()
            renamed.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", check)
    checkpoints.save(tmp_path, checkpoint(1), keep=2)
    assert renamed == [tmp_path / "step-00000001"]
    assert tmp_path.stat().st_ino in synced


def test_a_full_disk_leaves_the_last_checkpoint_and_no_leftovers(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, checkpoint(1), keep=2)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(tmp_path, checkpoint(2), keep=2)
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoints.read_state(checkpoints.newest(tmp_path)).step == 1


def test_any_damage_is_detected_and_the_previous_checkpoint_is_used(
    tmp_path,
):
    older = checkpoints.save(tmp_path, checkpoint(1), keep=2)
    newer = checkpoints.save(tmp_path, checkpoint(2), keep=2)
    rng = random.Random(0)
    for round_number in range(100):
        path = rng.choice(sorted(newer.iterdir()))
        whole = path.read_bytes()
        place = rng.randrange(len(whole))
        if round_number % 3:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << rng.randrange(8)
        else:
            damaged = whole[:place]
        path.write_bytes(damaged)
        with pytest.raises(manifest.BrokenFolderError):
            manifest.verify(newer)
        with pytest.warns(UserWarning, match="skipped a damaged checkpoint"):
            assert checkpoints.newest(tmp_path) == older
        path.write_bytes(whole)
    assert checkpoints.newest(tmp_path) == newer


def test_if_every_checkpoint_is_damaged_the_run_is_refused(tmp_path):
    path = checkpoints.save(tmp_path, checkpoint(1), keep=2)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000001: state\.json is missing"):
        checkpoints.newest(tmp_path)


@pytest.mark.parametrize("change", ["added", "linked"])
def test_an_added_or_linked_file_is_detected(tmp_path, change):
    path = checkpoints.save(tmp_path, checkpoint(1), keep=2)
    if change == "added":
        (path / "extra.py").write_text("")
    else:
        (path / "state.json").rename(tmp_path / "elsewhere.json")
        (path / "state.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"extra\.py|not a regular file"):
        checkpoints.newest(tmp_path)


def test_foreign_folders_are_left_unchanged(tmp_path):
    foreign = tmp_path / "step-00000001"
    foreign.mkdir()
    (foreign / "work.txt").write_text("mine")
    (tmp_path / ".tmp-notes").mkdir()
    with pytest.raises(FileExistsError, match="exists and is no checkpoint: move it away"):
        checkpoints.save(tmp_path, checkpoint(1), keep=2)
    for step in (2, 3, 4):
        checkpoints.save(tmp_path, checkpoint(step), keep=2)
    assert (foreign / "work.txt").read_text() == "mine"
    assert names(tmp_path) == [".tmp-notes", "step-00000001", "step-00000003", "step-00000004"]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (
            {"format": 99, "infllm_flex": "7.0"},
            "format 99, written by infllm_flex 7.0; .*: upgrade",
        ),
        (
            {"format": 1},
            "format 1, written by infllm_flex of an unknown version; .* 2: resume it with",
        ),
    ],
)
def test_a_checkpoint_of_another_format_is_refused_and_left_unchanged(tmp_path, state, said):
    path = checkpoints.save(tmp_path, checkpoint(1), keep=2)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=said):
        checkpoints.read_state(path)
    with pytest.raises(CheckpointError, match=said):
        checkpoints.export(path, tmp_path / "model")
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize(
    ("weights", "optimizer", "said"),
    [
        (
            {"w": torch.zeros(3, 6)},
            {},
            r"model\.w is float32 \[3, 5\] in the checkpoint and float32 \[3, 6\] in this run",
        ),
        (
            {"w": torch.zeros(3, 5).half()},
            {},
            r"float32 \[3, 5\] in the checkpoint and float16 \[3, 5\]",
        ),
        ({"w": torch.zeros(3, 5), "v": torch.zeros(1)}, {}, r"has no model\.v"),
        ({}, {}, r"has model\.w, which this run does not have"),
        (
            {"w": torch.zeros(3, 5)},
            {"0": torch.zeros(2)},
            r"has optimizer\.1, which this run does not have",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, weights, optimizer, said):
    saved = checkpoint(
        1,
        weights={"w": torch.ones(3, 5)},
        optimizer={"0": torch.ones(2), "1": torch.ones(2)},
    )
    path = checkpoints.save(tmp_path, saved, keep=2)
    with pytest.raises(CheckpointError, match=said + ".*: the checkpoint belongs to another"):
        checkpoints.load(path, weights, optimizer, {})
    assert all(not tensor.any() for tensor in [*weights.values(), *optimizer.values()])


def test_loading_reports_a_missing_random_state(tmp_path):
    path = checkpoints.save(tmp_path, checkpoint(1, random_state={}), keep=2)
    like = checkpoint(0)
    assert not checkpoints.load(path, like.weights, like.optimizer, like.random_state)
    assert (like.weights["w"] == 1).all()


def test_pytorch_unpickles_nothing_of_a_checkpoint(tmp_path, monkeypatch):
    saved = checkpoint(1)
    path = checkpoints.save(tmp_path, saved, keep=2)

    def forbidden(*_, **__):
        raise AssertionError("unpickled")

    for module, name in [(torch, "load"), (pickle, "load"), (pickle, "loads")]:
        monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr(pickle, "Unpickler", forbidden)
    assert checkpoints.newest(tmp_path) == path
    assert torch.equal(load(path, saved).weights["w"], saved.weights["w"])
    checkpoints.export(path, tmp_path / "model")
