"""Small runs and texts for the tests of training."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import infllm_flex as ifx
from infllm_flex.training.settings import (
    CheckpointSettings,
    DataSettings,
    LogSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    StageSettings,
    TinyModelSettings,
    TrainingSettings,
)

TINY = TinyModelSettings(
    num_layers=2, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2
)
ATTENTION = ifx.InfLLMConfig(
    kernel_size=4, kernel_stride=2, block_size=8, window_size=8, topk=2, dense_len=64
)


def write_texts(folder: Path, files: int = 30, length: int = 400) -> Path:
    """Write a folder of different text files, made from hashes."""
    for number in range(files):
        words = [hashlib.sha256(f"{number}/{i}".encode()).hexdigest()[:7] for i in range(length)]
        path = folder / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(words)[:length])
    return folder


def write_lines(path: Path, texts: list[str]) -> Path:
    """Write a .jsonl file with one document per line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def stage(**changes: Any) -> StageSettings:
    values = {"max_length": 32, "batch_size": 2, "steps": 3, "learning_rate": 1e-2}
    values["warmup_steps"] = 1  # a run without a schedule warns
    return StageSettings(**({"attention": "dense"} | values | changes))


LONG = stage(max_length=64, decay_steps=2, rope_theta=50_000.0)


def settings(folder: Path, texts: Path, **changes: Any) -> TrainingSettings:
    """A run of six steps in two stages, both dense, the second with another ``rope_theta``."""
    values: dict[str, Any] = {
        "run": RunSettings(folder=folder, device="cpu"),
        "model": ModelSettings(tiny=TINY),
        "stages": {"short": stage(warmup_steps=1), "long": LONG},
        "attention": ATTENTION,
        "data": DataSettings(source=str(texts), held_out_percent=20),
        "optim": OptimSettings(),
        "checkpoint": CheckpointSettings(every=100),
        "log": LogSettings(every=1),
    }
    return TrainingSettings(**(values | changes))


def weights_hash(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def course(run: TrainingSettings) -> list[dict[str, Any]]:
    """The metrics that are equal in equal runs: all but speed and memory."""
    same = ("step", "stage", "loss", "gradient_norm", "learning_rate", "sparse_layers")
    lines = (run.run.folder / "metrics.jsonl").read_text().splitlines()
    return [{name: json.loads(line)[name] for name in same} for line in lines]


def metrics(run: TrainingSettings) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    lines = (run.run.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def interrupted(real: Any, step: int, number: int = signal.SIGINT) -> Any:
    """Wrap a sampler's ``batch`` to send a signal while it makes the batch of a step."""
    calls = iter(range(1, 1000))

    def batch(self: Any, indices: Any) -> Any:
        if next(calls) == step:
            os.kill(os.getpid(), number)
        return real(self, indices)

    return batch
