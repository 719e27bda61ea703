"""The training of the variants."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from evaluation.quality.names import RULER_TASKS, TASKS


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
        check_tasks(self.tasks, (*TASKS, *RULER_TASKS))
        if sum(self.tasks.values()) <= 0 or min(self.tasks.values()) < 0:
            raise ValueError(
                f"tasks must have frequencies of at least 0, one of them above 0, got {self.tasks}"
            )


def check_tasks(tasks: Iterable[str], known: tuple[str, ...] = TASKS) -> None:
    """Check that tasks are known.

    Raises:
        ValueError: One is not.
    """
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise ValueError(f"tasks must be among {', '.join(known)}, got {unknown[0]}")
