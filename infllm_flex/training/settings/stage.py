"""Stages of a training run, and the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from infllm_flex.strict_yaml import check_range
from infllm_flex.training.settings.selection_loss import SelectionLossSettings

LARGEST_COUNT = 2**31 - 1
_LARGEST_LENGTH = 2**24


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage of the training. Each stage starts with a fresh optimizer.

    The learning rate warms up linearly, stays constant, and decays linearly to zero.

    Attributes:
        max_length: Tokens per sequence.
        batch_size: Sequences per step, over all processes.
        sequences_at_once: Sequences of a process per micro-batch; gradients are accumulated. 0:
            all sequences of the process in one micro-batch.
        steps: Optimizer steps.
        learning_rate: Peak learning rate.
        attention: ``"sparse"`` patches the model with the ``attention`` section.
        warmup_steps: Steps of the warm-up.
        decay_steps: Steps of the decay.
        rope_theta: Base of the rotary embedding from this stage on. A larger base extends a model
            beyond the positions it was trained with. None: unchanged.
        length_buckets: Largest length in tokens of each length class but the last, which ends at
            ``max_length``. Every class contributes the same number of tokens. Empty: one class,
            so that documents are drawn uniformly.
        selection_loss: A loss that trains the selection of blocks, in dense stages, too. None:
            none.
    """

    max_length: int
    batch_size: int
    steps: int
    learning_rate: float
    attention: Literal["dense", "sparse"] = "sparse"
    sequences_at_once: int = 0
    warmup_steps: int = 0
    decay_steps: int = 0
    rope_theta: float | None = None
    length_buckets: tuple[int, ...] = ()
    selection_loss: SelectionLossSettings | None = None

    def __post_init__(self) -> None:
        check_range("max_length", self.max_length, 2, _LARGEST_LENGTH)
        check_range("batch_size", self.batch_size, 1, 65536)
        check_range("sequences_at_once", self.sequences_at_once, 0, 65536)
        check_range("steps", self.steps, 1, LARGEST_COUNT)
        if not 0 < self.learning_rate <= 1:
            raise ValueError(
                f"learning_rate must be above 0 and at most 1, got {self.learning_rate}"
            )
        check_range("warmup_steps", self.warmup_steps, 0, LARGEST_COUNT)
        check_range("decay_steps", self.decay_steps, 0, LARGEST_COUNT)
        if self.rope_theta is not None and self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1, got {self.rope_theta}")
        bounds = (0, *self.length_buckets, self.max_length)
        if any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(
                f"length_buckets must ascend and stay below max_length = {self.max_length}, "
                f"got {list(self.length_buckets)}"
            )
        if self.selection_loss and self.selection_loss.queries > self.max_length:
            raise ValueError(
                f"selection_loss must have queries of at most max_length = {self.max_length}, "
                f"got {self.selection_loss.queries}"
            )
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"steps must be at least warmup_steps + decay_steps = "
                f"{self.warmup_steps + self.decay_steps}, got {self.steps}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all processes."""
        return self.batch_size * self.max_length


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """The optimizer.

    Attributes:
        kind: ``adamw``; ``muon`` (Muon for the matrices of the layers, AdamW for the rest, with the
            same learning rate); or ``adamw8bit`` (AdamW with 8-bit state, from torchao).
        beta1: Decay of AdamW's first moment.
        beta2: Decay of AdamW's second moment.
        weight_decay: Decoupled weight decay, applied to matrices only.
        clip_norm: Largest norm of the gradient of all weights.
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
