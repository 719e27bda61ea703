"""Training samples in the forms of RULER, from ``lm-eval``'s own prompts."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.quality.base import load_tokenizer
from evaluation.quality.parts import SkippedError
from evaluation.quality.rows import Question, Row, Span, random_window
from evaluation.quality.ruler import check_variable_tracking, make_prompts, no_sentences

_TRAINING_SEEDS = 1_000_000  # added to the seed of a run: no prompt of evaluation is trained on


class Prompt(NamedTuple):
    """Tokens of a prompt and of its answer."""

    context: list[int]
    answer: list[int]


class RulerRows:
    """Makes sequences that end with a prompt of RULER and its answer.

    Args:
        tasks: Names of the tasks.
        text: Tokens ``[N]`` that fill the sequence in front of a prompt.
        length: Tokens of a sequence.
        tokenizer: Folder of the tokenizer.
        seed: Seed of the run.
        prompts: Prompts of each task; sequences draw from them.
        beginning: Tokens at the beginning of a sequence.

    Raises:
        ValueError: A task has no prompt of this length.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        text: Tensor,
        length: int,
        tokenizer: Path,
        seed: int,
        prompts: int,
        beginning: Sequence[int] = (),
    ) -> None:
        self._text, self._length, self._beginning = text, length, list(beginning)
        most = length - len(beginning)
        self._prompts = _read_prompts(tasks, most, tokenizer, seed, prompts) if tasks else {}

    def row(self, task: str, random: Random) -> Row:
        """Make a sequence of a task, a function of the state of ``random``."""
        prompt = random.choice(self._prompts[task])
        tokens = [*self._beginning, *prompt.context]
        room = self._length - len(tokens) - len(prompt.answer)
        tokens[len(self._beginning) : len(self._beginning)] = random_window(
            random, self._text, room
        ).tolist()
        answer = Span(len(tokens), len(tokens) + len(prompt.answer))
        return Row(torch.tensor(tokens + prompt.answer), (Question(answer, ()),))


def _read_prompts(
    tasks: tuple[str, ...], length: int, tokenizer: Path, seed: int, count: int
) -> dict[str, list[Prompt]]:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    encode = load_tokenizer(tokenizer)
    if "ruler_vt" in tasks:
        try:
            check_variable_tracking(encode, length)
        except SkippedError as error:
            raise ValueError(f"tuning.tasks: {error}") from error
    with no_sentences(), contextlib.redirect_stdout(io.StringIO()):
        made = make_prompts(tasks, length, str(tokenizer), _TRAINING_SEEDS + seed, count)
    prompts: dict[str, list[Prompt]] = {}
    for name, task in made["tasks"].items():
        read = []
        for doc in task.test_docs():
            prefix = task.doc_to_prefix(doc)
            context = task.fewshot_context(doc, num_fewshot=0, gen_prefix=prefix)
            parts = context, " " + " ".join(doc["outputs"])
            read.append(
                Prompt(*(encode(part, add_special_tokens=False).input_ids for part in parts))
            )
        prompts[name] = [one for one in read if len(one.context) + len(one.answer) <= length]
        if not prompts[name]:
            raise ValueError(f"tuning: {name}: no prompt fits {length} tokens: raise tuning.length")
    return prompts
