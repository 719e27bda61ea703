"""The kinds of attention that the quickstart compares."""

from __future__ import annotations

from dataclasses import dataclass

from evaluation.controls import window_only
from infllm_flex.config import InfLLMConfig

DENSE, SPARSE, SPARSE_COARSE, WINDOW = "dense", "sparse", "sparse, coarse", "window only"

# A query attends to 64 blocks of 16 keys, a quarter of 4096; every key of a block is scored.
FINE = InfLLMConfig(
    kernel_size=1,
    kernel_stride=1,
    pool_queries=True,
    score_dtype="float8",
    block_size=16,
    window_size=256,
    topk=48,
    dense_len=1024,
    engine="fused",  # no compiler needed
)
# The same budget, in blocks of 64 that are scored by means of 32 keys, as in the 8B checkpoints.
COARSE = InfLLMConfig(window_size=256, topk=12, dense_len=1024, engine="fused")


@dataclass(frozen=True)
class Arm:
    """A kind of attention.

    Attributes:
        name: Its name in tables.
        attention: Its settings; None: dense.
    """

    name: str
    attention: InfLLMConfig | None

    def keys_attended(self, length: int) -> float:
        """Return the fraction of a sequence's keys that its last query attends to."""
        if self.attention is None:
            return 1.0
        return self.attention.budget_tokens / length


def pretrained_arms() -> list[Arm]:
    """Return the arms of the pretrained model."""
    return [
        Arm(DENSE, None),
        Arm(SPARSE, FINE),
        Arm(SPARSE_COARSE, COARSE),
        Arm(WINDOW, window_only(FINE)),
    ]


def tiny_arms(attention: InfLLMConfig) -> list[Arm]:
    """Return the arms of the tiny model. They train on the same samples in the same order."""
    return [Arm(DENSE, None), Arm(SPARSE, attention), Arm(WINDOW, window_only(attention))]
