"""Sequences of a task: facts spread over text, and questions at the end."""

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
    """A question of a row.

    Attributes:
        answer: The tokens that a correct answer predicts.
        needles: The facts that the answer follows from; the first one holds the value.
    """

    answer: Span
    needles: tuple[Span, ...]


@dataclass(frozen=True)
class Row:
    """A sequence of a task.

    Attributes:
        tokens: int64 ``[N]``.
        questions: Questions in the order of the sequence.
    """

    tokens: Tensor
    questions: tuple[Question, ...]

    def is_answer(self) -> Tensor:
        """Return the mask of tokens that belong to answers, bool ``[N]``."""
        marks = torch.zeros(len(self.tokens), dtype=torch.bool)
        for question in self.questions:
            marks[question.answer.start : question.answer.end] = True
        return marks

    def depth(self, question: Question) -> int:
        """Return the tenth of the sequence that holds the value, 0 to 9."""
        return 10 * question.needles[0].start // len(self.tokens)


class QuestionTokens(NamedTuple):
    """A question before it has a place in a row.

    Attributes:
        prompt: Tokens before the answer.
        answer: Tokens of the answer.
        facts: Numbers of the facts that it follows from; the first one holds the value.
    """

    prompt: list[int]
    answer: list[int]
    facts: tuple[int, ...]


def compose(
    random: Random,
    text: Tensor,
    length: int,
    facts: Sequence[list[int]],
    asked: Sequence[QuestionTokens],
    beginning: Sequence[int] = (),
) -> Row:
    """Insert facts at random places of a random window of text, and append questions.

    Args:
        random: Draws window and places.
        text: Tokens ``[N]`` of any integer type.
        length: Tokens of the row.
        facts: Tokens of each fact; the row keeps their order.
        asked: The questions.
        beginning: Tokens at the beginning of the row.

    Raises:
        ValueError: The text or the row is too short.
    """
    tail = sum(len(item.prompt) + len(item.answer) for item in asked)
    room = length - len(beginning) - tail - sum(map(len, facts))
    if room < len(facts):
        raise ValueError(
            f"a sequence of {length} tokens is too short for {len(facts)} facts and {len(asked)} "
            f"questions, which have {length - room} tokens: use longer sequences"
        )
    hay = random_window(random, text, room).tolist()
    tokens = list(beginning)
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


def random_window(random: Random, text: Tensor, length: int) -> Tensor:
    """Return a random window of ``length`` tokens.

    Raises:
        ValueError: The text is shorter.
    """
    if len(text) < length:
        raise ValueError(
            f"text: expected at least {length} tokens, those of a sequence, got {len(text)}: give "
            "more text"
        )
    start = random.randrange(len(text) - length + 1)
    return text[start : start + length]
