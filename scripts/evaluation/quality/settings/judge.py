"""How every model is judged."""

from __future__ import annotations

from dataclasses import dataclass

from evaluation.quality.names import RULER_TASKS, TASKS
from evaluation.quality.settings.tuning import check_tasks

GROUPS = ("retrieval", "nats", "generation", "shares", "ruler")


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
        check_tasks(self.tasks)
        for name in ("groups", "tasks", "ruler_tasks", "ruler_lengths"):
            value = list(getattr(self, name))
            if len(set(value)) < len(value) or (name != "groups" and not value):
                raise ValueError(f"{name} must be at least one, none twice, got {value}")
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
