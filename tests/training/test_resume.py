"""A run resumes from any step in the same bits, on other processes and after failures."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch

from infllm_flex.training import checkpoints
from infllm_flex.training.checkpoints.shards import read_on_this_rank, read_outline
from infllm_flex.training.loop import train
from infllm_flex.training.settings import (
    CheckpointSettings,
    DataSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
)
from tests.tolerance import assert_within_rounding
from tests.training.forked import run_ranks, start
from tests.training.runs import TINY, course, settings, stage, weights_hash, write_lines

STEPS = 20


@pytest.fixture
def packed(tmp_path):
    texts = [f"{i} is a number. " * (i % 7 + 1) for i in range(90)]
    path = write_lines(tmp_path / "a.jsonl", texts)
    return DataSettings(source=str(path), packing="documents", held_out_percent=0)


@pytest.fixture
def with_dropout(tmp_path):
    """A model folder whose training draws random numbers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256,
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
    )
    torch.manual_seed(1)
    folder = tmp_path / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return ModelSettings(path=folder)


def tensors_of(checkpoint):
    tensors = {n: torch.empty(s, dtype=d) for n, (s, d) in read_outline(checkpoint).items()}
    read_on_this_rank(checkpoint, tensors)
    return tensors


def in_folder(run, folder):
    return replace(run, run=replace(run.run, folder=folder))


def test_every_step_of_twenty_can_be_resumed_in_the_same_bits(tmp_path, packed, with_dropout):
    """Losses, weights, optimizer state and random state equal those of an uninterrupted run."""
    straight = settings(
        tmp_path / "straight",
        tmp_path,
        model=with_dropout,
        data=packed,
        stages={"a": stage(steps=8), "b": stage(steps=STEPS - 8, max_length=64)},
        checkpoint=CheckpointSettings(every=1, keep=1000),
    )
    expected = train(straight, show=False)
    last_but_one = straight.run.folder / "checkpoints" / f"step-{STEPS - 1:08d}"
    for step in range(1, STEPS):
        run = in_folder(straight, tmp_path / str(step))
        run = replace(run, checkpoint=CheckpointSettings(every=STEPS - 1, keep=1000))
        kept = run.run.folder / "checkpoints"
        shutil.copytree(straight.run.folder, run.run.folder, ignore=lambda *_: ["model"])
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(kept / f"step-{later:08d}")
        torch.rand(7)  # a new process would have another random state
        resumed = train(run, resume=True, show=False)
        assert weights_hash(resumed.model) == weights_hash(expected.model)
        assert course(run) == course(straight)
        ours, theirs = tensors_of(kept / last_but_one.name), tensors_of(last_but_one)
        assert ours.keys() == theirs.keys()
        assert {name.split(".")[0] for name in ours} == {"model", "optimizer", "random"}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def train_in_ranks(run, resume):
    outcome = train(run, resume=resume, show=False)
    return outcome.step


def losses_and_norms(run):
    return torch.tensor([[line["loss"], line["gradient_norm"]] for line in course(run)])


def test_a_run_resumes_with_another_number_of_processes(tmp_path, packed):
    """One process saves, two resume, then four; the result is that of one, within rounding."""
    run = settings(
        tmp_path / "moved",
        tmp_path,
        data=packed,
        stages={"a": stage(steps=9, batch_size=4, max_length=64)},
        checkpoint=CheckpointSettings(every=3, keep=1000),
    )
    straight = in_folder(run, tmp_path / "straight")
    train(straight, show=False)
    one_by_one = {"a": replace(run.stages["a"], sequences_at_once=1)}
    in_parts = replace(in_folder(run, tmp_path / "parts"), stages=one_by_one)
    train(in_parts, show=False)
    shutil.copytree(straight.run.folder, run.run.folder)
    kept = run.run.folder / "checkpoints"
    for count, step in ((2, 3), (4, 6)):
        for path in kept.iterdir():
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        assert run_ranks(count, tmp_path, train_in_ranks, run, True) == [9] * count
        assert checkpoints.read_state(kept / f"step-{step + 3:08d}").processes == count
    ours, whole, parts = (losses_and_norms(r) for r in (run, straight, in_parts))
    assert torch.equal(ours[:3], whole[:3])
    for column in (0, 1):
        assert_within_rounding(
            ours[:, column], whole[:, column].double(), parts[:, column], factor=3.0
        )


@pytest.mark.slow  # torchao compiles its step in each process
def test_sharded_8_bit_state_resumes_on_the_same_number_of_processes_only(tmp_path, packed):
    run = settings(
        tmp_path / "run",
        tmp_path,
        model=ModelSettings(tiny=replace(TINY, hidden_size=128)),
        data=packed,
        stages={"a": stage(steps=4, batch_size=2, max_length=64)},
        optim=OptimSettings(kind="adamw8bit"),
        checkpoint=CheckpointSettings(every=2),
    )
    assert run_ranks(2, tmp_path, train_in_ranks, run, False) == [4, 4]
    expected = weights_hash(run.run.folder / "model")
    shutil.rmtree(run.run.folder / "checkpoints" / "step-00000004")
    with pytest.raises(checkpoints.CheckpointError, match=r"8-bit .*: resume with 2 "):
        train(run, resume=True, show=False)
    assert run_ranks(2, tmp_path, train_in_ranks, run, True) == [4, 4]
    assert weights_hash(run.run.folder / "model") == expected


def limited(run, size):
    """Train on a disk that refuses files of more than ``size`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the writer gets an error, as from a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    train(run, resume=True, show=False)


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path, packed, capfd):
    run = settings(
        tmp_path / "run",
        tmp_path,
        data=packed,
        stages={"a": stage(steps=6, max_length=64)},
        checkpoint=CheckpointSettings(every=2),
    )
    straight = in_folder(run, tmp_path / "straight")
    expected = train(straight, show=False)
    shutil.copytree(straight.run.folder, run.run.folder)
    kept = run.run.folder / "checkpoints"
    shutil.rmtree(kept / "step-00000006")
    shutil.rmtree(run.run.folder / "model")
    before = sorted(path.name for path in kept.iterdir())
    child = start(limited, run, 60_000)
    assert os.waitpid(child, 0)[1] >> 8 == 1
    complaint = r"OSError: .*step-\d+ was not written: .*File too large.*checkpoints are kept"
    assert re.search(complaint, capfd.readouterr().err)
    assert sorted(path.name for path in kept.iterdir()) == before == ["step-00000004"]
    resumed = train(run, resume=True, show=False)
    assert weights_hash(resumed.model) == weights_hash(expected.model)


def test_sigterm_saves_and_ends_the_process_within_a_few_steps(tmp_path, packed):
    run = settings(
        tmp_path / "run",
        tmp_path,
        data=packed,
        stages={"a": stage(steps=100_000, max_length=64)},
        checkpoint=CheckpointSettings(every=100_000),
    )
    child = start(train_to_the_signal, run)
    lines = run.run.folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (lines.exists() and lines.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    done = len(lines.read_text().splitlines())
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == 0
    saved = checkpoints.newest(run.run.folder / "checkpoints")
    step = checkpoints.read_state(saved).step
    assert step == len(course(run))
    assert done <= step < done + 100


def train_to_the_signal(run):
    assert train(run, show=False).signal == signal.SIGTERM


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_changed_text_is_refused(tmp_path, packing):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{i} is a number. " * 9 for i in range(50)))
    data = DataSettings(source=str(path), packing=packing, held_out_percent=0)
    run = settings(tmp_path / "run", tmp_path, data=data)
    train(run, show=False)
    path.write_text(path.read_text().replace("number", "digits"))
    before = sorted(p.name for p in (run.run.folder / "checkpoints").iterdir())
    with pytest.raises(checkpoints.CheckpointError, match=r"data\.source has changed"):
        train(run, resume=True, show=False)
    assert sorted(p.name for p in (run.run.folder / "checkpoints").iterdir()) == before


def test_a_checkpoint_copied_from_another_model_is_refused(tmp_path, packed):
    run = settings(tmp_path / "run", tmp_path, data=packed)
    train(run, show=False)
    wide = ModelSettings(tiny=replace(TINY, intermediate_size=64))
    other = settings(tmp_path / "other", tmp_path, data=packed, model=wide)
    train(other, show=False)
    shutil.copytree(
        other.run.folder / "checkpoints", run.run.folder / "checkpoints", dirs_exist_ok=True
    )
    said = r"mlp.* is float32 \[.*\] in the checkpoint and float32 \[.*\] in this run"
    with pytest.raises(checkpoints.CheckpointError, match=said):
        train(run, resume=True, show=False)


def test_other_files_in_the_model_folder_are_refused_before_any_work(tmp_path, packed):
    run = settings(tmp_path / "run", tmp_path, data=packed)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "mine.txt").write_text("mine")
    (tmp_path / "run" / "run.yaml").write_text("")
    with pytest.raises(ValueError, match=r"run/model holds other files"):
        train(run, resume=True, show=False)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert run.run == RunSettings(folder=tmp_path / "run", device="cpu")
