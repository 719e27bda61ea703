"""Recall of sentences hidden in a long text, and the loss on that text, by a pretrained model."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from evaluation.quality.rows import QuestionTokens, Row, compose
from evaluation.quality.scoring import Scorer
from evaluation.quality.words import Vocabulary

_WORDS = 4


@dataclass(frozen=True)
class Passwords:
    """A text with hidden sentences, whose beginnings are repeated at the end.

    Attributes:
        row: All tokens; each word of a password is a question.
        is_text: bool ``[N]``, the tokens of the second half that belong neither to a hidden
            sentence nor to a question.
    """

    row: Row
    is_text: Tensor


def hide_passwords(vocabulary: Vocabulary, text: str, length: int, facts: int) -> Passwords:
    """Hide sentences of equal form, each with a password of four words, in a text.

    Args:
        vocabulary: Words of the model's tokenizer.
        text: A text of more than ``length`` tokens.
        length: Tokens of the model's input; the row has one more, the last label.
        facts: Number of hidden sentences.

    Raises:
        ValueError: The text is too short.
    """
    random, encode = Random("passwords"), vocabulary.encode
    names = vocabulary.names(random, True, facts * (_WORDS + 1), 1)
    hidden: list[list[int]] = []
    asked: list[list[QuestionTokens]] = []
    for number in range(facts):
        name, *words = names[number * (_WORDS + 1) : (number + 1) * (_WORDS + 1)]
        start = encode(f"\nThe password of the{name} is")
        hidden.append([*start, *encode("".join(words)), *encode(".\n")])
        prompts = [start, *([[]] * (_WORDS - 1))]
        asked.append(
            [QuestionTokens(p, encode(w), (number,)) for p, w in zip(prompts, words, strict=True)]
        )
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
    """Run a model over the text once, with its present attention.

    Returns:
        ``asked`` and ``right``: words of passwords, and correct ones; ``nats``: loss per token of
        the text's second half.
    """
    row = passwords.row
    costs, hits = scorer.nats_and_hits(row.tokens[None])
    answers = row.is_answer()[1:]
    return {
        "right": int(hits[0][answers].sum()),
        "asked": int(answers.sum()),
        "nats": float(costs[0][passwords.is_text[1:]].mean()),
    }
