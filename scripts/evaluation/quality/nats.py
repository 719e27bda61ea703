"""Nats per token of held-out text, by how much of it came before."""

from __future__ import annotations

from typing import Any

from evaluation.by_position import Bucket, doubling_buckets
from evaluation.quality.scoring import Scorer
from evaluation.quality.settings import QualitySettings
from evaluation.quality.text import windows
from infllm_flex.training.data.store import TokenStore


def buckets(length: int) -> list[Bucket]:
    """The ranges of positions that are reported; the last is the second half of the sequence."""
    return doubling_buckets(length, max(1, length // 8))


def judge_nats(settings: QualitySettings, scorer: Scorer, store: TokenStore) -> dict[str, Any]:
    """Measure held-out text; the same stretches for every model and seed.

    Returns:
        ``buckets``: by name of a bucket, the mean of each stretch of text.
    """
    cut = windows(store.held_out, settings.length, settings.judge.windows)
    found: dict[str, list[float]] = {str(b): [] for b in buckets(settings.length)}
    for batch in cut.split(settings.judge.batch_size):
        costs = scorer.nats(batch)
        for bucket in buckets(settings.length):
            found[str(bucket)] += costs[:, bucket.first - 1 : bucket.last].mean(1).tolist()
    return {"buckets": found}
