"""Training samples: plain text and tasks, a function of seed and sample number only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from evaluation.quality.names import RULER_TASKS
from evaluation.quality.rows import Row, random_window
from evaluation.quality.ruler_rows import RulerRows
from evaluation.quality.settings import TuningSettings
from evaluation.quality.tasks import TaskMaker
from evaluation.quality.words import Vocabulary
from infllm_flex.training.data import Batch, Sampler
from infllm_flex.training.data.store import TokenStore
from infllm_flex.training.settings import StageSettings

_MOST_PROMPTS = 200  # of each task of RULER: more take longer to make


class Mixture:
    """The text of `infllm_flex.training.loop.train`.

    Args:
        store: Tokens of the text.
        vocabulary: Words and values of the facts.
        tuning: Proportions of text and tasks.
        tokenizer: Folder of the tokenizer, for RULER's prompts.

    Attributes:
        identity: A hash that is equal exactly for equal samples.
        vocabulary: Upper bound of token numbers, exclusive.
    """

    def __init__(
        self, store: TokenStore, vocabulary: Vocabulary, tuning: TuningSettings, tokenizer: Path
    ) -> None:
        self._store, self._words, self._tuning = store, vocabulary, tuning
        self._tokenizer = tokenizer
        what = [tuning.tasks, tuning.task_share, tuning.emphasis, tuning.questions]
        what += [vocabulary.beginning] if vocabulary.beginning else []
        described = json.dumps([store.identity, what])
        self.identity = hashlib.sha256(described.encode()).hexdigest()
        self.vocabulary = store.vocabulary

    def sampler(self, name: str, stage: StageSettings, seed: int) -> Sampler:
        """Return the samples of a stage.

        Raises:
            ValueError: The text is too short for a sample.
        """
        text, length, tuning = self._store.train.tokens, stage.max_length, self._tuning
        tasks = tuple(task for task in tuning.tasks if task in RULER_TASKS)
        samples = int(tuning.steps * tuning.batch_size * tuning.task_share)
        prompts = max(1, min(_MOST_PROMPTS, samples // len(tuning.tasks)))
        beginning = self._words.beginning
        ruler = RulerRows(tasks, text, length + 1, self._tokenizer, seed, prompts, beginning)
        sampler = MixtureSampler(text, self._words, tuning, length, seed, ruler)
        sampler.check()
        return sampler


class MixtureSampler:
    """Makes samples from their numbers, independently of earlier calls.

    Args:
        text: Tokens ``[N]``.
        vocabulary: Words and values of the facts.
        tuning: Proportions of text and tasks.
        length: Tokens of a sample.
        seed: Seed of the run.
        ruler: Samples in the forms of RULER; None: ``tuning`` has none.
    """

    def __init__(
        self,
        text: Tensor,
        vocabulary: Vocabulary,
        tuning: TuningSettings,
        length: int,
        seed: int,
        ruler: RulerRows | None = None,
    ) -> None:
        self._text, self._tuning, self._length, self._seed = text, tuning, length, seed
        self._ruler, self._beginning = ruler, torch.tensor(vocabulary.beginning, dtype=torch.long)
        self._maker = TaskMaker(vocabulary, text, length + 1, False, tuning.questions)

    def check(self) -> None:
        """Make one sample of each task.

        Raises:
            ValueError: The text or the length is too short for a task.
        """
        for task in self._tuning.tasks:
            self._row(task, Random(0))

    def batch(self, indices: Iterable[int]) -> Batch:
        """Return the samples of ``indices``, one per row."""
        parts = [self._sample(index) for index in indices]
        tokens = torch.stack([tokens for tokens, _ in parts])
        weights = torch.stack([weights for _, weights in parts])
        ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return Batch(ids, labels, weights=weights[:, 1:].contiguous())

    def _sample(self, index: int) -> tuple[Tensor, Tensor]:
        random, tuning = Random(f"{self._seed}/{index}"), self._tuning
        weights = torch.ones(self._length + 1)
        if random.random() >= tuning.task_share:
            size = self._length + 1 - len(self._beginning)
            window = random_window(random, self._text, size).long()
            return torch.cat([self._beginning, window]), weights
        task = random.choices(list(tuning.tasks), list(tuning.tasks.values()))[0]
        row = self._row(task, random)
        answer = row.is_answer()
        weights[answer] += tuning.emphasis * self._length / int(answer.sum())
        return row.tokens, weights

    def _row(self, task: str, random: Random) -> Row:
        if task in RULER_TASKS:
            assert self._ruler is not None
            return self._ruler.row(task, random)
        return self._maker.row(task, random)
