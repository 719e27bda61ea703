"""Where and how to measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infllm_flex.strict_yaml import check_range


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where and how to measure.

    Attributes:
        out: The CSV. Rows are appended; existing rows are never replaced.
        device: Where to run.
        dtype: dtype of all tensors.
        threads: CPU threads; 0 keeps PyTorch's number.
        seed: Seed of the inputs.
        tests: Arguments of pytest; unless these tests pass, nothing is timed.
        warmup: Runs of each subject before timing, compilation included.
        rounds: Smallest number of rounds; a round runs everything that is compared once.
        max_rounds: Largest number of rounds.
        seconds: Time after which a comparison ends, once it has had ``rounds`` rounds.
    """

    out: Path
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = 0
    seed: int = 0
    tests: tuple[str, ...] = ()
    warmup: int = 1
    rounds: int = 5
    max_rounds: int = 30
    seconds: float = 30.0

    def __post_init__(self) -> None:
        check_range("threads", self.threads, 0, 1024)
        check_range("seed", self.seed, 0, 2**63 - 1)
        check_range("warmup", self.warmup, 1, 1000)
        check_range("rounds", self.rounds, 1, 100_000)
        check_range("max_rounds", self.max_rounds, self.rounds, 100_000)
        check_range("seconds", self.seconds, 0, 86_400)
        if self.out.suffix != ".csv":
            raise ValueError(f"out must name a .csv file, got {self.out}")


@dataclass(frozen=True, kw_only=True)
class FloorSettings:
    """Peak rates of the device, from which the column ``ms_floor`` is computed.

    Attributes:
        tflops: Matrix products, in 10^12 operations per second.
        terabytes: Memory, in 10^12 bytes per second.
        float8_tflops: Matrix products of float8 numbers; None: equal to ``tflops``.
    """

    tflops: float
    terabytes: float
    float8_tflops: float | None = None

    def __post_init__(self) -> None:
        for name in ("tflops", "terabytes", "float8_tflops"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
