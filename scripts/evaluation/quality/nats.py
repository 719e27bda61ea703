"""Nats per token of held-out text, by position in the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evaluation.quality.scoring import Scorer
from evaluation.quality.settings import QualitySettings
from evaluation.quality.text import windows
from infllm_flex.training.data.store import TokenStore


@dataclass(frozen=True)
class Bucket:
    """Token positions ``first`` to ``last``, both inclusive, counted from 1."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


def buckets(length: int) -> list[Bucket]:
    """Cut positions 1 to ``length`` into an eighth, the next eighth, a quarter, and a half."""
    ends = sorted({length >> halvings for halvings in range(4)} - {0})
    starts = [1, *(end + 1 for end in ends)]
    return [Bucket(first, last) for first, last in zip(starts, ends, strict=False)]


def judge_nats(
    settings: QualitySettings, scorer: Scorer, store: TokenStore, beginning: Sequence[int]
) -> dict[str, Any]:
    """Measure held-out text: the same windows for every model and seed.

    Args:
        settings: All settings.
        scorer: The model.
        store: The text.
        beginning: Tokens at the beginning of every sequence.

    Returns:
        ``buckets``: by name of a bucket, the mean of each window.
    """
    length = settings.length - len(beginning)
    cut = windows(store.held_out, length, settings.judge.windows)
    cut = torch.cat([torch.tensor([list(beginning)] * len(cut), dtype=cut.dtype), cut], 1)
    found: dict[str, list[float]] = {str(b): [] for b in buckets(settings.length)}
    for batch in cut.split(settings.judge.batch_size):
        costs = scorer.nats(batch)
        for bucket in buckets(settings.length):
            found[str(bucket)] += costs[:, bucket.first - 1 : bucket.last].mean(1).tolist()
    return {"buckets": found}
