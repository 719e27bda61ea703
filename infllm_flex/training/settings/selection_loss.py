"""The training signal for the selection of blocks."""

from __future__ import annotations

from dataclasses import dataclass

from infllm_flex.strict_yaml import check_range

_LARGEST_COUNT = 2**24


@dataclass(frozen=True, kw_only=True)
class SelectionLossSettings:
    """A loss that trains queries and keys to score highly the blocks that dense attention needs.

    Selection itself has no gradient. This loss, added to that of the stage, is the divergence of
    the block scores from dense attention summed by block, in nats per sampled query, averaged over
    layers and key/value heads, logged as ``selection_loss``. It needs ``parallel.context: 1``.

    Attributes:
        weight: Factor on the loss.
        every: Steps from one computation to the next; the steps between train without it.
        queries: Queries of each sequence that it looks at, drawn anew in every step. Its cost is
            that of scoring, and of the products of dense attention, for so many queries.
    """

    weight: float = 1.0
    every: int = 1
    queries: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1000:
            raise ValueError(
                f"weight must be above 0 and at most 1000, got {self.weight}: to train without the "
                "loss, leave out selection_loss"
            )
        check_range("every", self.every, 1, _LARGEST_COUNT)
        check_range("queries", self.queries, 1, _LARGEST_COUNT)
