"""A synthetic task: facts, each a key with a value, among noise; questions for them at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from infllm_flex.training.data import NO_LABEL, Batch, Sampler
from infllm_flex.training.settings import StageSettings

_KEYS, _VALUES, _NOISE = 10, 16, 48
_FACT = 0
_NOISE_FROM = _FACT + _KEYS * _VALUES
_ASK = _NOISE_FROM + _NOISE
_ANSWER = _ASK + _KEYS
_VOCABULARY = _ANSWER + _VALUES
_SPAN = 4  # a fact is one token for key and value, repeated this often


@dataclass(frozen=True)
class Sequence:
    """A sequence with facts and questions.

    Attributes:
        tokens: int64 ``[N]``.
        labels: int64 ``[N]``, the value at each question, `NO_LABEL` elsewhere.
        places: int64 ``[N]``, at each question the position of its fact; -1 elsewhere.
    """

    tokens: Tensor
    labels: Tensor
    places: Tensor


class PairsText:
    """The text of `infllm_flex.training.loop.train`; a sample is a function of its number."""

    identity = f"pairs/{_KEYS}/{_VALUES}/{_NOISE}/{_SPAN}"
    vocabulary = _VOCABULARY

    def sampler(self, name: str, stage: StageSettings, seed: int) -> Sampler:
        """Return the samples of a stage."""
        return PairsSampler(stage.max_length, f"{seed}/{name}")


class PairsSampler:
    """Makes samples from their numbers.

    Args:
        length: Tokens of a sample.
        key: Seed of all samples; stages and seeds of a run have different ones.

    Raises:
        ValueError: The length leaves no room for facts and questions.
    """

    def __init__(self, length: int, key: str) -> None:
        self._facts = min(_KEYS, length // (2 * _SPAN))
        self._questions = min(24, length // 4)
        if self._facts < 2:
            raise ValueError(f"max_length: expected {4 * _SPAN} tokens or more, got {length}")
        self._length, self._key = length, key

    def batch(self, indices: Iterable[int]) -> Batch:
        """Return the samples of ``indices``, one per row."""
        rows = [self.sequence(index) for index in indices]
        return Batch(
            torch.stack([row.tokens for row in rows]), torch.stack([row.labels for row in rows])
        )

    def sequence(self, index: int) -> Sequence:
        """Make one sample."""
        random = Random(f"{self._key}/{index}")
        context = self._length - self._questions
        tokens = [_NOISE_FROM + random.randrange(_NOISE) for _ in range(context)]
        slots = random.sample(range(context // _SPAN), self._facts)
        keys = random.sample(range(_KEYS), self._facts)
        values = [random.randrange(_VALUES) for _ in keys]
        for slot, key, value in zip(slots, keys, values, strict=True):
            tokens[_SPAN * slot : _SPAN * (slot + 1)] = [_FACT + key * _VALUES + value] * _SPAN
        labels, places = [NO_LABEL] * context, [-1] * context
        for _ in range(self._questions):
            asked = random.randrange(self._facts)
            tokens.append(_ASK + keys[asked])
            labels.append(_ANSWER + values[asked])
            places.append(_SPAN * slots[asked])
        return Sequence(torch.tensor(tokens), torch.tensor(labels), torch.tensor(places))


@torch.no_grad()
def right_answers(model: torch.nn.Module, sequences: list[Sequence], beyond: int) -> Tensor:
    """Find the questions that a model answers correctly, among those whose fact is far away.

    Args:
        model: A causal LM of transformers.
        sequences: Sequences of equal length.
        beyond: Smallest distance in tokens between fact and question.

    Returns:
        bool ``[questions]``.
    """
    tokens = torch.stack([row.tokens for row in sequences])
    labels = torch.stack([row.labels for row in sequences])
    places = torch.stack([row.places for row in sequences])
    far = (places >= 0) & (torch.arange(tokens.shape[1]) - places >= beyond)
    found = model(tokens, use_cache=False).logits.argmax(-1)
    return found[far] == labels[far]
