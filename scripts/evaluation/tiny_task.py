"""Training of tiny models on the synthetic task of `evaluation.pairs`, and their answers."""

from __future__ import annotations

import torch

from evaluation.pairs import PairsSampler, PairsText, right_answers
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
