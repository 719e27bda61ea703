"""Long generation: execute a program step by step; lines of the answer depend on earlier lines."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from evaluation.quality.arms import AttentionMode
from evaluation.quality.names import STEPS
from evaluation.quality.parts import SkippedError
from evaluation.quality.rows import Row
from evaluation.quality.scoring import Scorer
from evaluation.quality.settings import QualitySettings
from evaluation.quality.tasks import evaluation_maker
from evaluation.quality.words import Vocabulary


def judge_generation(
    settings: QualitySettings,
    scorer: Scorer,
    mode: AttentionMode,
    vocabulary: Vocabulary,
    text: Tensor,
    seed: int,
) -> dict[str, Any]:
    """Let a model execute programs by greedy generation, and compare the answers line by line.

    Weights are in bfloat16 on a GPU.

    Args:
        settings: All settings.
        scorer: The model.
        mode: The attention that the model has now.
        vocabulary: Words and values of the facts.
        text: Held-out tokens ``[N]``.
        seed: Seed of the programs.

    Returns:
        ``hits``: for each program, 0 or 1 for each line; ``tokens``: tokens generated for each.

    Raises:
        SkippedError: The prompts are so short that a query sees all of them.
    """
    judge = settings.judge
    maker = evaluation_maker(settings, vocabulary, text)
    rows = [maker.row(STEPS, Random(f"generate/{seed}/{n}")) for n in range(judge.programs)]
    prompts = of_equal_length(rows, len(vocabulary.beginning))
    length = prompts.shape[1]
    if mode.attention is not None and mode.visible(length) == length:
        raise SkippedError(
            f"a query of {mode.name} sees all {length} tokens of a prompt: lower "
            f"attention.dense_len, or raise judge.length by {settings.length - length}"
        )
    longest = max(len(row.tokens) - _prompt_end(row) for row in rows)
    if scorer.is_half:
        scorer.model.to(torch.bfloat16)
    hits: list[list[int]] = []
    for first in range(0, len(rows), judge.generation_batch):
        some = rows[first : first + judge.generation_batch]
        made_of_some = _generate(scorer, prompts[first : first + len(some)], longest)
        for row, made in zip(some, made_of_some, strict=True):
            hits.append(_lines_right(row, made, vocabulary))
    return {"hits": hits, "tokens": longest}


def of_equal_length(rows: list[Row], beginning: int) -> Tensor:
    """Return prompts that need no padding: longer ones lose their first tokens of text.

    Args:
        rows: The sequences.
        beginning: Number of the tokens that begin every sequence, which stay, as facts do.

    Returns:
        int64 ``[N, S]``, ``S`` the length of the shortest prompt.
    """
    shortest = min(_prompt_end(row) for row in rows)
    prompts = []
    for row in rows:
        kept = torch.ones(_prompt_end(row), dtype=torch.bool)
        is_text = kept.clone()
        is_text[:beginning] = False
        for question in row.questions:
            for needle in question.needles:
                is_text[needle.start : needle.end] = False
        kept[is_text.nonzero()[: len(kept) - shortest, 0]] = False
        prompts.append(row.tokens[: len(kept)][kept])
    return torch.stack(prompts)


def _prompt_end(row: Row) -> int:
    return row.questions[0].answer.start


def _generate(scorer: Scorer, prompts: Tensor, tokens: int) -> Tensor:
    ids = prompts.to(scorer.device)
    with torch.no_grad():
        made = scorer.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,  # an end-of-text token does not end the answer
            pad_token_id=0,
        )
    return made[:, ids.shape[1] :].cpu()


def _lines_right(row: Row, made: Tensor, vocabulary: Vocabulary) -> list[int]:
    """Tell for each line of the answer whether it is correct; extra lines do not count."""
    answers = [row.tokens[q.answer.start : q.answer.end].tolist() for q in row.questions]
    expected = [vocabulary.decode(answer).strip("\n") for answer in answers]
    lines = vocabulary.decode(made.tolist()).strip("\n").split("\n")
    lines += [""] * (len(expected) - len(lines))
    return [int(line == right) for line, right in zip(lines, expected, strict=False)]
