"""Everything a training run can be told, one frozen dataclass per section of its YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from infllm_flex.config import InfLLMConfig

STDLIB = "python_stdlib"
_LARGEST_LENGTH = 2**24
_LARGEST_COUNT = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where and how the run happens.

    Attributes:
        folder: Holds the run: settings, metrics and checkpoints. New, or the same run's own.
        seed: Decides the initial weights and the order of the data.
        device: ``"auto"`` takes the GPU where there is one.
        threads: CPU threads; 0 leaves PyTorch's choice.
    """

    folder: Path
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        _check_range(self, "seed", 0, 2**63 - 1)
        _check_range(self, "threads", 0, 1024)


@dataclass(frozen=True, kw_only=True)
class TinyModelSettings:
    """A Llama-style model with random weights and one token per byte.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: Width, a multiple of ``num_heads``.
        intermediate_size: Width of the feed-forward layers.
        num_heads: Query heads, a multiple of ``num_kv_heads``.
        num_kv_heads: Key/value heads.
        rope_theta: Base of the rotary embedding.
    """

    num_layers: int = 4
    hidden_size: int = 128
    intermediate_size: int = 336
    num_heads: int = 4
    num_kv_heads: int = 2
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads"):
            _check_range(self, name, 1, 65536)
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size must be a multiple of twice num_heads = {2 * self.num_heads}, "
                f"got {self.hidden_size}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads = {self.num_kv_heads}, "
                f"got {self.num_heads}"
            )
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1, got {self.rope_theta}")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model to train: exactly one of ``path`` and ``tiny``.

    Attributes:
        path: A local transformers folder with ``config.json`` and safetensors weights. Nothing is
            downloaded and no code of the folder is run.
        tiny: A small model to make, with random weights.
        dtype: Precision of weights and arithmetic.
    """

    path: Path | None = None
    tiny: TinyModelSettings | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.tiny is None):
            raise ValueError("exactly one of path and tiny must be given")
        if self.path is None:
            return
        if not self.path.is_dir():
            raise ValueError(f"path must be a local folder, got {self.path}, which is none")
        if not (self.path / "config.json").is_file():
            raise ValueError(f"path must hold a config.json, {self.path} has none")
        if not any(self.path.glob("*.safetensors")):
            raise ValueError(f"path must hold *.safetensors weights, {self.path} has none")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The text, read as bytes, one token each.

    Attributes:
        source: ``python_stdlib`` for the sources of the Python that runs this, or a local folder
            or text file.
        pattern: Which files of a folder are text, its subfolders included.
        held_out_percent: Share of the files, chosen by a hash of their relative path, that is
            never trained on.
    """

    source: str = STDLIB
    pattern: str = "*.txt"
    held_out_percent: int = 10

    def __post_init__(self) -> None:
        _check_range(self, "held_out_percent", 0, 90)
        if self.source != STDLIB and not Path(self.source).expanduser().exists():
            raise ValueError(
                f"source must be {STDLIB} or a local folder or file, got {self.source!r}"
            )
        if not self.pattern or "/" in self.pattern:
            raise ValueError(f"pattern must be a file name pattern, got {self.pattern!r}")


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One part of the training; stages follow one another with a fresh optimizer each.

    The learning rate rises linearly, stays, and falls linearly to zero at the end.

    Attributes:
        max_length: Tokens per sequence.
        batch_size: Sequences per step.
        steps: Optimizer steps.
        learning_rate: Its highest value.
        attention: ``"sparse"`` patches the model with the ``attention`` section.
        warmup_steps: Steps of the rise.
        decay_steps: Steps of the fall.
    """

    max_length: int
    batch_size: int
    steps: int
    learning_rate: float
    attention: Literal["dense", "sparse"] = "sparse"
    warmup_steps: int = 0
    decay_steps: int = 0

    def __post_init__(self) -> None:
        _check_range(self, "max_length", 2, _LARGEST_LENGTH)
        _check_range(self, "batch_size", 1, 65536)
        _check_range(self, "steps", 1, _LARGEST_COUNT)
        if not 0 < self.learning_rate <= 1:
            raise ValueError(
                f"learning_rate must be above 0 and at most 1, got {self.learning_rate}"
            )
        _check_range(self, "warmup_steps", 0, _LARGEST_COUNT)
        _check_range(self, "decay_steps", 0, _LARGEST_COUNT)
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"steps must be at least warmup_steps + decay_steps = "
                f"{self.warmup_steps + self.decay_steps}, got {self.steps}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens the model sees per optimizer step."""
        return self.batch_size * self.max_length


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """The optimizer.

    Attributes:
        kind: ``adamw``; ``muon`` (Muon for the layers' matrices, AdamW for the rest, at the same
            learning rate); or ``adamw8bit`` (AdamW with 8-bit state, from torchao).
        beta1: Decay of AdamW's mean of gradients.
        beta2: Decay of AdamW's mean of squared gradients.
        weight_decay: Decoupled, on matrices only.
        clip_norm: Largest norm of the gradient of all weights together.
    """

    kind: Literal["adamw", "muon", "adamw8bit"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        if not 0 <= self.weight_decay <= 1:
            raise ValueError(f"weight_decay must be between 0 and 1, got {self.weight_decay}")
        if self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be above 0, got {self.clip_norm}")


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
        _check_range(self, "every", 1, _LARGEST_COUNT)
        _check_range(self, "keep", 2, 1000)


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What is written to ``metrics.jsonl``.

    Attributes:
        every: Steps between lines.
    """

    every: int = 10

    def __post_init__(self) -> None:
        _check_range(self, "every", 1, _LARGEST_COUNT)


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What ``scripts/quickstart`` measures on held-out files after training.

    Attributes:
        windows: Stretches of text, each from one file, as long as the last stage's sequences.
        batch_size: Windows per forward pass.
    """

    windows: int = 48
    batch_size: int = 4

    def __post_init__(self) -> None:
        _check_range(self, "windows", 1, 100_000)
        _check_range(self, "batch_size", 1, 65536)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """A whole run, as ``scripts/finetune.py`` reads it from one YAML file.

    Attributes:
        run: Folder, seed, device.
        model: What is trained.
        stages: The parts of the training by name, in order.
        attention: The sparse attention of the stages that ask for it.
        data: The text.
        optim: The optimizer.
        checkpoint: When to save.
        log: When to write metrics.
        compare: Only read by ``scripts/quickstart``.
    """

    run: RunSettings
    model: ModelSettings
    stages: dict[str, StageSettings]
    attention: InfLLMConfig = field(default_factory=InfLLMConfig)
    data: DataSettings = field(default_factory=DataSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)
    compare: CompareSettings = field(default_factory=CompareSettings)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages must name at least one stage, got none")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages.values())


def _check_range(settings: object, name: str, low: int, high: int) -> None:
    value = getattr(settings, name)
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
