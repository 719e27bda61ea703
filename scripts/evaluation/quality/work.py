"""Execution of the parts of a comparison, each once, by one or several processes of one folder."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

import torch

from benchmarking.environment import describe_environment
from evaluation.quality import base, text
from evaluation.quality.arms import Arm, arms, attention_modes
from evaluation.quality.generation import judge_generation
from evaluation.quality.mixture import Mixture
from evaluation.quality.names import SHARES, STEPS
from evaluation.quality.nats import judge_nats
from evaluation.quality.parts import Folder, Part, SkippedError
from evaluation.quality.plan import BASE, judge_name
from evaluation.quality.retrieval import judge_retrieval
from evaluation.quality.scoring import Scorer
from evaluation.quality.settings import QualitySettings
from evaluation.quality.tasks import evaluation_maker
from evaluation.quality.tuning import training_settings, tune
from evaluation.quality.words import Vocabulary
from infllm_flex.training.data.store import TokenStore
from infllm_flex.training.run_folder import CHECKPOINTS, MODEL

Say = Callable[[str], None]


class StoppedError(Exception):
    """A signal came, or the time was up; finished parts are saved."""

    def __init__(self, signal: int) -> None:
        super().__init__("stopped; run the same command to continue after the last finished part")
        self.status = 128 + signal


@dataclass
class Worker:
    """One process that works on the parts of a comparison.

    Attributes:
        settings: All settings.
        device: Device of the models.
        source: Source of the base; None where the base is in the folder already.
        say: Function that prints a line of progress.
    """

    settings: QualitySettings
    device: torch.device
    source: base.Source | None
    say: Say

    def __post_init__(self) -> None:
        self.folder = Folder(self.settings.run.folder)
        self._is_checked = False
        # Without this, transformers warns when workers are forked after the tokenizer used threads.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

    def do(self, wanted: Sequence[Part], everything: Sequence[Part]) -> list[Part]:
        """Do all parts that are not done, and wait for other processes where they must come first.

        Args:
            wanted: The parts that this process may do, with all parts that they need.
            everything: All parts, in order.

        Returns:
            The parts of ``wanted`` that were skipped.

        Raises:
            StoppedError: A signal came.
        """
        by_name = {part.name: part for part in everything}
        skipped: set[str] = set()
        while True:
            todo = [part for part in wanted if self.folder.result(part) is None]
            todo = [part for part in todo if part.name not in skipped]
            ready = [part for part in todo if self._is_ready(part, by_name)]
            if any(self._try(part, skipped) for part in ready):
                continue
            # Another process may be working on the parts that this one cannot do now.
            waited = [by_name[name] for part in todo for name in self._missing(part, by_name)]
            if not any(self._wait(part) for part in [*ready, *waited]):
                return [part for part in wanted if self.folder.result(part) is None]

    def _missing(self, part: Part, by_name: dict[str, Part]) -> list[str]:
        return [name for name in part.needs if self.folder.result(by_name[name]) is None]

    def _is_ready(self, part: Part, by_name: dict[str, Part]) -> bool:
        return not self._missing(part, by_name)

    def _wait(self, part: Part) -> bool:
        """Wait while another process works on a part; return whether one did."""
        with self.folder.claim(part) as mine:
            if mine:
                return False
        with self.folder.claim(part, wait=True):
            return True

    def _try(self, part: Part, skipped: set[str]) -> bool:
        with self.folder.claim(part) as mine:
            if not mine:
                return False
            if self.folder.result(part) is not None:
                return True  # another process has finished it
            self.folder.begin(part)
            started = time.perf_counter()
            self.say(f"{part.name} ...")
            try:
                result = self._work(part)
            except SkippedError as reason:
                self.say(f"{part.name} skipped: {reason}")
                skipped.add(part.name)
                return True
            finally:
                gc.collect()  # a trained model is in a reference cycle with its own forward
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            self.folder.finish(part, {**result, "environment": self._environment()})
            self.say(f"{part.name} done in {time.perf_counter() - started:.0f} s")
            return True

    def _environment(self) -> dict[str, str]:
        found = describe_environment(self.device)
        found["transformers"] = importlib.metadata.version("transformers")
        return found | ({"commit": self.settings.run.commit} if self.settings.run.commit else {})

    def _work(self, part: Part) -> dict[str, Any]:
        kind, _, rest = part.name.partition(":")
        if kind == "base":
            if self.source is None:
                return {}
            as_it_is = self.settings.tuning is None
            links = base.prepare(
                self.settings.base, self.source, self._longest, self._base, as_it_is
            )
            beginning = base.beginning(base.load_tokenizer(self._base))
            return {base.LINKS: links, base.BEGINNING: beginning}
        if kind == "text":
            text.prepare(self.settings.text, self._base, self._text)
            store = text.open_text(self._text)
            return {"train": len(store.train.tokens), "held_out": len(store.held_out.tokens)}
        self._check_tasks()
        if kind == "train":
            name, _, seed = rest.partition(":")
            return self._train(name, int(seed))
        return self._judge(part)

    def _check_tasks(self) -> None:
        """Make one sequence of each task that is judged, before any training.

        Raises:
            ValueError: The text or the length is too short for a task.
        """
        if self._is_checked:
            return
        judge = self.settings.judge
        tasks = [*judge.tasks] if "retrieval" in judge.groups else []
        tasks += [STEPS] if "generation" in judge.groups else []
        tasks += [SHARES] if "shares" in judge.groups else []
        maker = evaluation_maker(self.settings, *self._maker_parts)
        for task in tasks:
            try:
                maker.row(task, Random(0))
            except ValueError as error:
                raise ValueError(f"judge: {task}: {error}") from error
        self._is_checked = True

    def _train(self, name: str, seed: int) -> dict[str, Any]:
        mode, folder = attention_modes(self.settings)[name], self._model_folder(name, seed)
        recipe = training_settings(self.settings, mode, seed, self._base, folder, self.device)
        assert self.settings.tuning is not None  # else nothing is trained
        mixture = Mixture(self._store, self._vocabulary, self.settings.tuning, self._base)
        started = time.perf_counter()
        outcome = tune(recipe, mode, mixture, f"{name} {seed}")
        if outcome.signal:
            raise StoppedError(outcome.signal)
        shutil.rmtree(folder / CHECKPOINTS)  # only the final model is needed
        return {"seconds": time.perf_counter() - started}

    def _judge(self, part: Part) -> dict[str, Any]:
        arm, seed, group = self._arm(part)
        model = self._base
        if self.settings.tuning is not None:
            model = self._model_folder(arm.tuned, seed) / MODEL
        mode = attention_modes(self.settings)[arm.run]
        if group == "ruler":
            from evaluation.quality.ruler import judge_ruler

            return judge_ruler(self.settings, model, mode, self.device, seed)
        if group == "shares":
            from evaluation.quality.shares import judge_shares

            words, held_out = self._maker_parts
            return judge_shares(self.settings, model, mode, self.device, words, held_out, seed)
        scorer = Scorer(model, self.device)
        with mode.on(scorer.model):
            if group == "nats":
                return judge_nats(self.settings, scorer, self._store, self._vocabulary.beginning)
            words, held_out = self._maker_parts
            if group == "generation":
                return judge_generation(self.settings, scorer, mode, words, held_out, seed)
            return judge_retrieval(self.settings, scorer, words, held_out, seed)

    def _arm(self, part: Part) -> tuple[Arm, int, str]:
        for arm in arms(self.settings):
            for seed in self.settings.run.seeds:
                for group in self.settings.judge.groups:
                    if judge_name(arm, seed, group) == part.name:
                        return arm, seed, group
        raise AssertionError(part.name)

    @property
    def _base(self) -> Any:
        return self.folder.path / "base"

    @property
    def _text(self) -> Any:
        return self.folder.path / "text"

    def _model_folder(self, name: str, seed: int) -> Any:
        return self.folder.path / "models" / f"{name}-{seed}"

    @property
    def _longest(self) -> int:
        return longest(self.settings)

    @cached_property
    def _store(self) -> TokenStore:
        return text.open_text(self._text)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        about = self.folder.result(Part(BASE, (), {})) or {}
        # Folders from before this key keep sequences without a beginning.
        return Vocabulary(base.load_tokenizer(self._base), about.get(base.BEGINNING, []))

    @property
    def _maker_parts(self) -> tuple[Vocabulary, torch.Tensor]:
        return self._vocabulary, self._store.held_out.tokens


def longest(settings: QualitySettings) -> int:
    """Return the tokens of the longest sequence of training and evaluation."""
    lengths = [settings.length]
    if settings.tuning is not None:
        lengths.append(settings.tuning.length)
    if "ruler" in settings.judge.groups:
        lengths += settings.judge.ruler_lengths
    return max(lengths)
