"""Training of tiny models on the synthetic task of `evaluation.pairs`, and their answers."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evaluation.pairs import PairsSampler, PairsText, right_answers
from evaluation.quality.statistics import interval
from evaluation.saved_results import Result
from infllm_flex.training.loop import train
from infllm_flex.training.settings import TrainingSettings

SEQUENCES = 32  # of an examination


def finish(run: TrainingSettings, title: str) -> None:
    """Train until a run is complete, from where it was interrupted.

    Raises:
        SystemExit: A signal stopped the training, which is saved.
    """
    if train(run, resume=True, text=PairsText(), title=title).signal:
        raise SystemExit("stopped and saved: run the same command to continue")


def ask(model: torch.nn.Module, length: int, beyond: int) -> tuple[list[int], list[int]]:
    """Ask a model about facts of held-out sequences, as it attends now.

    Args:
        model: A causal LM of transformers.
        length: Tokens of a sequence.
        beyond: Smallest distance in tokens between fact and question.

    Returns:
        Right answers, and questions, of each sequence.
    """
    sampler = PairsSampler(length, "held out")
    found = [right_answers(model, [sampler.sequence(n)], beyond) for n in range(SEQUENCES)]
    return [int(some.sum()) for some in found], [len(some) for some in found]


def share(results: Sequence[Result], mode: str) -> str:
    """Write the share of right answers, with its 95 % interval over models and sequences.

    Args:
        results: Results of one kind of model, one for each seed; ``asked`` are its questions.
        mode: Name of the right answers in a result.
    """
    columns = [[r[mode] for r in results], [r["asked"] for r in results]]
    values = torch.tensor(columns).movedim(0, -1).double()
    asked = values[..., 1].sum()[None]
    found = interval(values, lambda m: m[0] / m[1], nested=False, counts=asked)
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def counts(result: Result, mode: str) -> dict[str, Any]:
    """Return the columns ``items``, ``hits`` and ``value`` of a result's row."""
    items, hits = sum(result["asked"]), sum(result[mode])
    return {"items": items, "hits": hits, "value": f"{hits / items:.4f}"}


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows that have the same columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
