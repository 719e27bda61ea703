"""What a pretrained model recalls of sentences hidden in a long text, and how well it reads on."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from evaluation.quality.rows import Asked, Row, compose
from evaluation.quality.scoring import Scorer
from evaluation.quality.words import Vocabulary

_WORDS = 4


@dataclass(frozen=True)
class Passwords:
    """A text with hidden sentences, each of which begins again at the end.

    Attributes:
        row: All tokens; each word of a password is a question.
        is_text: bool ``[N]``, the tokens of the second half that are neither hidden sentence nor
            question.
    """

    row: Row
    is_text: Tensor


def hide_passwords(vocabulary: Vocabulary, text: str, length: int, facts: int) -> Passwords:
    """Hide sentences of one form, each with a password of four words, in a text.

    Args:
        vocabulary: Of the model.
        text: Long enough.
        length: Tokens that the model reads; the row has one more, to be predicted.
        facts: How many to hide.

    Raises:
        ValueError: The text is too short.
    """
    random, encode = Random("passwords"), vocabulary.encode
    names = vocabulary.names(random, True, facts * (_WORDS + 1), 1)
    hidden: list[list[int]] = []
    asked: list[list[Asked]] = []
    for number in range(facts):
        name, *words = names[number * (_WORDS + 1) : (number + 1) * (_WORDS + 1)]
        start = encode(f"\nThe password of the{name} is")
        hidden.append([*start, *encode("".join(words)), *encode(".\n")])
        prompts = [start, *([[]] * (_WORDS - 1))]
        asked.append([Asked(p, encode(w), (number,)) for p, w in zip(prompts, words, strict=True)])
    random.shuffle(asked)
    questions = [item for items in asked for item in items]
    tokens = torch.tensor(encode(text[: 16 * length]))
    row = compose(random, tokens, length + 1, hidden, questions)
    is_text = torch.arange(length + 1) > length // 2
    for question in row.questions:
        for needle in question.needles:
            is_text[needle.start : needle.end] = False
    tail = sum(len(item.prompt) + len(item.answer) for item in questions)
    is_text[length + 1 - tail :] = False
    return Passwords(row, is_text)


def judge_passwords(scorer: Scorer, passwords: Passwords) -> dict[str, Any]:
    """Let a model read it once, with the attention it has.

    Returns:
        ``right``, ``asked``: words of passwords; ``nats``: per token of the text's second half.
    """
    row = passwords.row
    costs, hits = scorer.nats_and_hits(row.tokens[None])
    answers = row.is_answer()[1:]
    return {
        "right": int(hits[0][answers].sum()),
        "asked": int(answers.sum()),
        "nats": float(costs[0][passwords.is_text[1:]].mean()),
    }
