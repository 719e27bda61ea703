"""The training loop: one process, one device, resumable at every step to the last bit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from infllm_flex.training.data import Batch, Corpus, Text, batches, open_text
from infllm_flex.training.folder import (
    CHECKPOINTS,
    DATA,
    METRICS,
    MODEL,
    check_folder,
    claim_folder,
)
from infllm_flex.training.interruption import Interruption
from infllm_flex.training.metrics import MetricsFile, Progress
from infllm_flex.training.schedule import position_of
from infllm_flex.training.settings import StageSettings, TrainingSettings
from infllm_flex.training.stages import stage_attention, warn_of_no_effect
from infllm_flex.training.state import TrainingState


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient is NaN or infinite; the last checkpoint is still good."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: Steps done in all.
        checkpoint: Folder of the newest checkpoint, to resume from.
        model: A transformers model folder, where the run is complete.
        signal: The signal that stopped the run early, 0 where it is complete.
    """

    step: int
    checkpoint: Path
    model: Path | None
    signal: int


def train(
    settings: TrainingSettings,
    *,
    resume: bool = False,
    corpus: Corpus | None = None,
    title: str = "training",
    show: bool = True,
) -> Outcome:
    """Train as the settings say and leave checkpoints, metrics and a model in the run's folder.

    Args:
        settings: The whole run.
        resume: Go on from the newest checkpoint of the folder, if it holds one. The result is bit
            for bit that of a run that was never stopped.
        corpus: The text, where the caller has read it before.
        title: Stands before the progress bar.
        show: Whether to draw the progress bar.

    Raises:
        ConfigError: The folder holds something else; nothing was done.
        ValueError: The model or the text does not fit the settings.
        TrainingDivergedError: The loss is not finite.
        CheckpointError: Every checkpoint of the folder is damaged.
    """
    check_folder(settings, resume)
    for name, stage in settings.stages.items():
        warn_of_no_effect(name, stage, settings.attention)
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    with claim_folder(settings) as folder:
        # Before signals are caught: there is nothing to save, and reading may take long.
        text = open_text(settings.data, folder / DATA, settings.model.path, corpus)
        with Interruption() as interruption:
            return _Trainer(settings, folder, text).run(interruption, title, show)


class _Trainer:
    def __init__(self, settings: TrainingSettings, folder: Path, text: Text) -> None:
        self._settings, self._folder, self._text = settings, folder, text
        self._device = _device(settings.run.device)
        self._state = TrainingState(settings, folder / CHECKPOINTS, text.identity, self._device)

    def run(self, interruption: Interruption, title: str, show: bool) -> Outcome:
        state, stages = self._state, self._settings.stages
        state.restore()
        metrics = MetricsFile(self._folder / METRICS, state.done)
        with (
            contextlib.closing(metrics),
            Progress(title, self._settings.total_steps, state.done, show) as progress,
        ):
            while (position := position_of(stages, state.done)) and not interruption.signal:
                state.enter_stage(position.name)
                progress.restart()
                self._run_stage(position.name, position.stage, interruption, progress, metrics)
            checkpoint = state.save()
            complete = state.done == self._settings.total_steps
            model = state.export(self._folder / MODEL) if complete else None
            return Outcome(state.done, checkpoint, model, interruption.signal)

    def _run_stage(
        self,
        name: str,
        stage: StageSettings,
        interruption: Interruption,
        progress: Progress,
        metrics: MetricsFile,
    ) -> None:
        settings, state = self._settings, self._state
        with stage_attention(state.model, stage, settings.attention) as sparse_layers:
            for batch in self._batches(name, stage):
                position = position_of(settings.stages, state.done)
                assert position is not None  # there is a batch for every step and no more
                loss, norm = self._step(batch.to(self._device), position.learning_rate)
                state.done += 1
                progress.advance(loss, stage.tokens_per_step)
                if state.done % settings.log.every == 0 or state.done == settings.total_steps:
                    metrics.write(
                        {
                            "step": state.done,
                            "stage": name,
                            "loss": loss,
                            "bits_per_byte": loss / math.log(2),
                            "gradient_norm": norm,
                            "learning_rate": position.learning_rate,
                            "tokens_per_second": round(progress.tokens_per_second),
                            "sparse_layers": sparse_layers,
                        }
                    )
                if state.done % settings.checkpoint.every == 0:
                    state.save()
                if interruption.signal:
                    return

    def _batches(self, name: str, stage: StageSettings) -> Iterator[Batch]:
        settings = self._settings
        position = position_of(settings.stages, self._state.done)
        assert position is not None
        return batches(
            self._text.sampler(name, stage, settings.run.seed),
            stage.batch_size,
            position.step,
            stage.steps,
            workers=settings.data.workers,
            pin_memory=self._device.type == "cuda",
        )

    def _step(self, batch: Batch, learning_rate: float) -> tuple[float, float]:
        logits = self._state.model(**batch.model_inputs()).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._diverged("the loss", value)
        loss.backward()
        norm = self._state.optimizers.step(learning_rate)
        if not math.isfinite(norm):
            raise self._diverged("the gradient", norm)
        return value, norm

    def _diverged(self, what: str, value: float) -> TrainingDivergedError:
        saved = self._state.saved
        last = f"the last checkpoint is of step {saved}" if saved >= 0 else "no checkpoint exists"
        return TrainingDivergedError(
            f"{what} of step {self._state.done + 1} is {value}: the run stops; {last}; "
            "a lower learning_rate may help"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: cuda is not available here; use cpu or auto")
    return torch.device(name)
