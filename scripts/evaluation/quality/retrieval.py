"""Retrieval: the questions that a model answers correctly, row by row."""

from __future__ import annotations

import statistics
import time
from random import Random
from typing import Any

from torch import Tensor

from evaluation.quality.rows import Row
from evaluation.quality.scoring import Scorer
from evaluation.quality.settings import QualitySettings
from evaluation.quality.tasks import evaluation_maker
from evaluation.quality.words import Vocabulary


def judge_retrieval(
    settings: QualitySettings, scorer: Scorer, vocabulary: Vocabulary, text: Tensor, seed: int
) -> dict[str, Any]:
    """Ask about held-out facts in held-out text; the rows are the same for every model.

    Args:
        settings: All settings.
        scorer: The model.
        vocabulary: Words and values of the facts.
        text: Held-out tokens ``[N]``.
        seed: Seed of the rows.

    Returns:
        By task: ``hits``, for each row a list of 0 and 1, and ``depths``, for each row the tenths
        of the sequence that hold the values. ``seconds``: the median time of a sequence.
    """
    judge = settings.judge
    maker = evaluation_maker(settings, vocabulary, text)
    tasks: dict[str, Any] = {}
    times: list[float] = []
    for task in judge.tasks:
        rows: list[Row] = []
        while sum(len(row.questions) for row in rows) < judge.items:
            rows.append(maker.row(task, Random(f"judge/{seed}/{task}/{len(rows)}")))
        hits: list[list[int]] = []
        for first in range(0, len(rows), judge.batch_size):
            some, started = rows[first : first + judge.batch_size], time.perf_counter()
            answers = scorer.answers(some)  # waits for the device
            times.append((time.perf_counter() - started) / len(some))
            hits += [[int(hit) for hit in row] for row in answers]
        depths = [[row.depth(question) for question in row.questions] for row in rows]
        tasks[task] = {"hits": hits, "depths": depths}
    return {"tasks": tasks, "seconds": statistics.median(times)}
