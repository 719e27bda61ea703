"""The files with the metrics of a run."""

from __future__ import annotations

import sys
import types

from infllm_flex.training.metrics import MetricsFile


def test_tensorboard_gets_every_number_if_it_is_installed(tmp_path, monkeypatch):
    said = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            said.append((folder, purge_step))

        def add_scalar(self, *values):
            said.append(values)

        def close(self):
            said.append("closed")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 4, tmp_path / "board")
    metrics.write({"step": 5, "stage": "long", "loss": 1.5, "mfu": None})
    metrics.close()
    assert said == [(str(tmp_path / "board"), 5), ("loss", 1.5, 5), "closed"]


def test_without_tensorboard_only_the_file_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, tmp_path / "board")
    metrics.write({"step": 1})
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not (tmp_path / "board").exists()
