"""A sequence of a task: facts spread over text, and questions at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Tokens ``start`` to ``end``, the latter exclusive."""

    start: int
    end: int


@dataclass(frozen=True)
class Question:
    """What is asked, and where.

    Attributes:
        answer: The tokens that must all be predicted.
        needles: The facts that the answer follows from; the first holds the value.
    """

    answer: Span
    needles: tuple[Span, ...]


@dataclass(frozen=True)
class Row:
    """A sequence.

    Attributes:
        tokens: int64 ``[N]``.
        questions: In the order of the sequence.
    """

    tokens: Tensor
    questions: tuple[Question, ...]

    def is_answer(self) -> Tensor:
        """Which tokens belong to answers, bool ``[N]``."""
        marks = torch.zeros(len(self.tokens), dtype=torch.bool)
        for question in self.questions:
            marks[question.answer.start : question.answer.end] = True
        return marks

    def depth(self, question: Question) -> int:
        """The tenth of the sequence that holds the value, 0 to 9."""
        return 10 * question.needles[0].start // len(self.tokens)


class Asked(NamedTuple):
    """Tokens before the answer, the answer, and the facts that it follows from."""

    prompt: list[int]
    answer: list[int]
    facts: tuple[int, ...]


def compose(
    random: Random,
    text: Tensor,
    length: int,
    facts: Sequence[list[int]],
    asked: Sequence[Asked],
) -> Row:
    """Put facts at random places of a random stretch of text, in their order, and questions behind.

    Args:
        random: Chooses stretch and places.
        text: Tokens ``[N]`` of any integer type.
        length: Tokens of the row.
        facts: Tokens of each.
        asked: The questions.

    Raises:
        ValueError: The text is too short, or the row.
    """
    tail = sum(len(item.prompt) + len(item.answer) for item in asked)
    room = length - tail - sum(map(len, facts))
    if room < len(facts):
        raise ValueError(
            f"a sequence of {length} tokens is too short for {len(facts)} facts and {len(asked)} "
            f"questions, which have {length - room} tokens: take longer ones"
        )
    hay = stretch(random, text, room).tolist()
    tokens: list[int] = []
    needles: list[Span] = []
    last = 0
    for place, fact in zip(sorted(random.sample(range(room), len(facts))), facts, strict=True):
        tokens += hay[last:place]
        needles.append(Span(len(tokens), len(tokens) + len(fact)))
        tokens += fact
        last = place
    tokens += hay[last:]
    questions = []
    for item in asked:
        tokens += item.prompt
        answer = Span(len(tokens), len(tokens) + len(item.answer))
        questions.append(Question(answer, tuple(needles[number] for number in item.facts)))
        tokens += item.answer
    return Row(torch.tensor(tokens), tuple(questions))


def stretch(random: Random, text: Tensor, length: int) -> Tensor:
    """A random stretch of ``length`` tokens.

    Raises:
        ValueError: The text is shorter.
    """
    if len(text) < length:
        raise ValueError(
            f"text: {len(text)} tokens are too few for sequences of {length}: give more text"
        )
    start = random.randrange(len(text) - length + 1)
    return text[start : start + length]
