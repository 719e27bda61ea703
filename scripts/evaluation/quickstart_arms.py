"""The ways to attend that the quickstart compares."""

from __future__ import annotations

from dataclasses import dataclass, replace

from evaluation.quickstart_report import DENSE
from infllm_flex.config import InfLLMConfig

SPARSE, COARSELY, WINDOW = "sparse", "sparse, coarse", "window only"

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
# The same share by blocks of 64, scored by means of 32 keys, as in the released 8B checkpoints.
COARSE = InfLLMConfig(window_size=256, topk=12, dense_len=1024, engine="fused")


@dataclass(frozen=True)
class Arm:
    """A way to attend; None: dense."""

    name: str
    attention: InfLLMConfig | None

    def keys_attended(self, length: int) -> float:
        """The share of a sequence's keys that its last query attends to."""
        if self.attention is None:
            return 1.0
        return self.attention.num_selected * self.attention.block_size / length


def pretrained_arms() -> list[Arm]:
    """The ways that a pretrained model is run."""
    return [
        Arm(DENSE, None),
        Arm(SPARSE, FINE),
        Arm(COARSELY, COARSE),
        Arm(WINDOW, window_of(FINE)),
    ]


def tiny_arms(attention: InfLLMConfig) -> list[Arm]:
    """The last stage three times: same samples, same order; only attention differs."""
    return [Arm(DENSE, None), Arm(SPARSE, attention), Arm(WINDOW, window_of(attention))]


def window_of(attention: InfLLMConfig) -> InfLLMConfig:
    """As many keys without a choice: the first block, the query's own and those before it."""
    topk, block = attention.init_blocks + 1, attention.block_size
    size = (attention.num_selected - topk) * block
    # No score is heeded: few keys to score, to save time.
    return replace(attention, topk=topk, window_size=size, kernel_size=block, kernel_stride=block)
