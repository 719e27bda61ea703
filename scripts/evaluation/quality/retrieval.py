"""Retrieval: how many questions a model answers right, row by row."""

from __future__ import annotations

import statistics
import time
from random import Random
from typing import Any

from torch import Tensor

from evaluation.quality.rows import Row
from evaluation.quality.scoring import Scorer
from evaluation.quality.settings import QualitySettings
from evaluation.quality.tasks import Maker
from evaluation.quality.words import Vocabulary


def judge_retrieval(
    settings: QualitySettings, scorer: Scorer, vocabulary: Vocabulary, text: Tensor, seed: int
) -> dict[str, Any]:
    """Ask about held-out facts in held-out text; the same rows whatever the model is.

    Args:
        settings: The whole comparison.
        scorer: The model.
        vocabulary: What facts are made of.
        text: Held-out tokens ``[N]``.
        seed: Of the rows.

    Returns:
        By task: ``hits``, for every row a list of 0 and 1, and ``depths``, for every row a list of
        the tenths of the sequence that hold the values. ``seconds``: the median time of a sequence.
    """
    judge = settings.judge
    maker = Maker(vocabulary, text, settings.length + 1, True, settings.tuning.questions)
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
