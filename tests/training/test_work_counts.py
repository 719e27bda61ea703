"""The work of batches and checkpoints in counts, which are the same on every machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from infllm_flex.training import atomic_folder, checkpoints, manifest
from infllm_flex.training.data import PackedSampler, WindowSampler, batches
from infllm_flex.training.data import sampler as sampler_module
from infllm_flex.training.data.store import Documents

LENGTH, BATCH, STEPS = 64, 4, 40


class CountedTokens:
    """Tokens that count how many of them were read."""

    def __init__(self, size: int) -> None:
        self._tokens = torch.randint(256, (size,), dtype=torch.uint8)
        self.read = 0

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, which: slice) -> torch.Tensor:
        part = self._tokens[which]
        self.read += len(part)
        return part


class Calls:
    """Counts the calls of a function."""

    def __init__(self, monkeypatch, owner, name) -> None:
        self.count, real = 0, getattr(owner, name)

        def call(*args, **kwargs):
            self.count += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)


def test_a_batch_of_windows_reads_its_own_tokens_and_an_epoch_is_shuffled_once(monkeypatch):
    stream = CountedTokens(LENGTH * (BATCH * STEPS + 2))
    shuffles = Calls(monkeypatch, torch, "randperm")
    steps = list(batches(WindowSampler(stream, LENGTH, 0, "a"), BATCH, 0, STEPS))
    assert len(steps) == STEPS
    assert stream.read == STEPS * BATCH * (LENGTH + 1)
    assert shuffles.count == 1


def test_a_batch_of_documents_reads_its_own_tokens_and_a_window_is_packed_once(monkeypatch):
    tokens = CountedTokens(30 * 1000)
    sampler = PackedSampler(Documents(tokens, torch.arange(0, 30_001, 30)), LENGTH, 0, "a")
    packings = Calls(monkeypatch, sampler_module, "pack")
    rows = list(batches(sampler, BATCH, 0, STEPS))
    assert len(rows) == STEPS
    assert STEPS * BATCH * LENGTH * 0.95 < tokens.read <= STEPS * BATCH * (LENGTH + 1)
    rows_per_window = 64
    assert packings.count == -(-STEPS * BATCH // rows_per_window)


@pytest.mark.parametrize("keep", [2, 3])
def test_saving_writes_every_tensor_once_and_reads_every_file_twice(tmp_path, monkeypatch, keep):
    weights = {str(i): torch.rand(64, 1000) for i in range(8)}
    optimizer = {f"{i}.exp_avg": torch.rand(64, 1000) for i in range(8)}
    checkpoint = checkpoints.Checkpoint(1, "t", weights, optimizer, {}, "{}\n")
    flushes = Calls(monkeypatch, os, "fsync")
    hashed = [Calls(monkeypatch, module, "describe_file") for module in (atomic_folder, manifest)]
    folder = checkpoints.save(tmp_path, checkpoint, keep)
    tensors = sum(t.nbytes for t in [*weights.values(), *optimizer.values()])
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert tensors < written < 1.01 * tensors
    files = len(list(folder.iterdir())) - 1  # without the manifest
    assert [calls.count for calls in hashed] == [files, files]
    # All files and the manifest, the folder and its parent; DCP flushes its shard as well.
    assert flushes.count == files + 3 + 1


def test_the_time_of_training_is_measured_by_a_script(tmp_path, capsys):
    from time_training import main

    config = Path(__file__).parents[2] / "configs" / "tiny_bytes.yaml"
    main(["--config", str(config), "--repeats", "1", "stages.short.max_length=32"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["batch", "step", "checkpoint"]
    assert all(float(line.partition(":")[2].split()[0]) > 0 for line in lines)
