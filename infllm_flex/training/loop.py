"""The training loop, which every process runs. A resumed run continues bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from infllm_flex.patch import LayerAttend
from infllm_flex.training.collectives import on_all_ranks, on_first_rank
from infllm_flex.training.data import Batch, Corpus, Text, batches, open_text, token_unit
from infllm_flex.training.layer_transforms import run_layers
from infllm_flex.training.metrics import MetricsFile, Progress
from infllm_flex.training.model_config import find_model
from infllm_flex.training.parallel import World, open_world
from infllm_flex.training.preflight import check_run
from infllm_flex.training.run_folder import (
    BOARD,
    CHECKPOINTS,
    DATA,
    METRICS,
    MODEL,
    check_folder,
    claim_folder,
)
from infllm_flex.training.schedule import Position, position_of
from infllm_flex.training.settings import TrainingSettings
from infllm_flex.training.signals import StopSignal
from infllm_flex.training.stage_attention import stage_attention
from infllm_flex.training.state import TrainingState
from infllm_flex.training.step import NotFiniteError, take_step
from infllm_flex.training.throughput import Meter


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient is NaN or infinite; the last checkpoint is still valid."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: Total number of finished steps.
        checkpoint: Folder of the newest checkpoint.
        model: The exported transformers model folder; None if the run is incomplete.
        signal: The signal that stopped the run early; 0 if the run is complete.
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
    text: Text | None = None,
    attend: LayerAttend | None = None,
    title: str = "training",
    show: bool = True,
) -> Outcome:
    """Train a model; writes checkpoints, metrics and the trained model to the run's folder.

    Args:
        settings: Settings of the run.
        resume: Continue from the newest checkpoint of the folder, if it holds one. The result is
            bit for bit that of an uninterrupted run.
        corpus: The text, if the caller has already read it.
        text: Samples made by the caller. Only ``workers`` is then used of the ``data`` section.
        attend: Replaces the attention of sparse stages; see `stage_attention`.
        title: Label of the progress bar.
        show: Whether to draw the progress bar and to announce stop signals.

    Raises:
        ConfigError: The folder holds another run or other files; nothing was done.
        ValueError: The model or the text does not fit the settings.
        TrainingDivergedError: The loss is not finite.
        CheckpointError: Every checkpoint of the folder is damaged.
        RankError: Another process of the run failed.
    """
    with open_world(settings) as world, ExitStack() as stack:
        found = on_first_rank(lambda: _check(settings, resume, world))
        if settings.run.threads:
            torch.set_num_threads(settings.run.threads)
        # The first process holds the lock for all of them.
        on_first_rank(lambda: stack.enter_context(claim_folder(settings, resume)))
        # The first process has downloaded the model by now.
        resolved = found or find_model(settings)
        # Signals are not caught yet: there is nothing to save, and reading text may take long.
        folder = resolved.run.folder
        text = text or on_all_ranks(
            lambda: open_text(resolved.data, folder / DATA, resolved.model.path, corpus)
        )
        for name, stage in resolved.stages.items():
            text.sampler(name, stage, resolved.run.seed)  # raises if a stage can have no samples
        with StopSignal(show and world.is_first) as stop_signal:
            return _Trainer(resolved, world, text, attend).run(stop_signal, title, show)


def _check(settings: TrainingSettings, resume: bool, world: World) -> TrainingSettings:
    """Check folder, model and stages; returns the settings with ``model.hub`` resolved."""
    check_folder(settings, resume)
    resolved = find_model(settings)
    check_run(resolved, world)
    return resolved


class _Trainer:
    def __init__(
        self, settings: TrainingSettings, world: World, text: Text, attend: LayerAttend | None
    ) -> None:
        self._settings, self._world, self._text = settings, world, text
        self._attend = attend
        self._folder = settings.run.folder
        self._unit = token_unit(text)
        self._state = TrainingState(settings, self._folder / CHECKPOINTS, text, world)

    def run(self, stop_signal: StopSignal, title: str, show: bool) -> Outcome:
        state, settings = self._state, self._settings
        state.restore()
        with ExitStack() as stack:
            metrics: MetricsFile | None = None
            if self._world.is_first:
                board = self._folder / BOARD if settings.log.tensorboard else None
                metrics = MetricsFile(self._folder / METRICS, state.done, board)
                stack.callback(metrics.close)
            progress = stack.enter_context(
                Progress(
                    title,
                    settings.total_steps,
                    state.done,
                    self._unit,
                    show and self._world.is_first,
                )
            )
            stopped = self._any_signal(stop_signal)
            while (position := position_of(settings.stages, state.done)) and not stopped:
                state.enter_stage(position.name)
                progress.restart()
                self._run_stage(position, stop_signal, progress, metrics)
                stopped = self._any_signal(stop_signal)
            checkpoint = state.save()
            complete = state.done == settings.total_steps
            model = state.export(self._folder / MODEL) if complete else None
            return Outcome(state.done, checkpoint, model, stopped)

    def _any_signal(self, stop_signal: StopSignal) -> int:
        """The signal that any process received, so that all stop after the same step."""
        return self._world.max(stop_signal.signal)

    def _run_stage(
        self,
        start: Position,
        stop_signal: StopSignal,
        progress: Progress,
        metrics: MetricsFile | None,
    ) -> None:
        settings, state, world, stage = self._settings, self._state, self._world, start.stage
        meter = Meter(state.model, stage, settings, world)
        with (
            stage_attention(
                state.model, stage, settings.attention, world, self._attend, settings.run.seed
            ) as attention,
            run_layers(state.layers, settings, world.device),
        ):
            for batch in self._batches(start):
                position = position_of(settings.stages, state.done)
                assert position is not None  # the loader yields one batch per remaining step
                try:
                    loss, norm = take_step(state, world, batch, position, attention)
                except NotFiniteError as error:
                    raise self._diverged(error, position) from error
                state.done += 1
                meter.count(batch)
                progress.advance(loss, stage.tokens_per_step)
                if self._logs_this_step():
                    values = {
                        "step": state.done,
                        "stage": start.name,
                        "loss": loss,
                        f"bits_per_{self._unit}": loss / math.log(2),
                        "gradient_norm": norm,
                        "learning_rate": position.learning_rate,
                        "tokens_per_second": round(progress.tokens_per_second),
                        "sparse_layers": attention.sparse_layers,
                    }
                    if attention.selection_loss:
                        values |= attention.selection_loss.values(world)
                    if metrics:
                        metrics.write(values | meter.values())
                if state.done % settings.checkpoint.every == 0:
                    state.save()
                if self._any_signal(stop_signal):
                    return

    def _logs_this_step(self) -> bool:
        done, settings = self._state.done, self._settings
        return done % settings.log.every == 0 or done == settings.total_steps

    def _batches(self, start: Position) -> Iterator[Batch]:
        settings, world, stage = self._settings, self._world, start.stage
        return batches(
            self._text.sampler(start.name, stage, settings.run.seed),
            stage.batch_size,
            start.step,
            stage.steps,
            rank=world.rank // world.context,
            ranks=world.data_size,
            workers=settings.data.workers,
            pin_memory=world.device.type == "cuda",
        )

    def _diverged(self, error: NotFiniteError, position: Position) -> TrainingDivergedError:
        saved, indices = self._state.saved, position.sample_indices()
        last = f"the last checkpoint is of step {saved}" if saved >= 0 else "no checkpoint exists"
        return TrainingDivergedError(
            f"step {self._state.done + 1}: {error}; its batch is samples {indices[0]} to "
            f"{indices[-1]} of stage {position.name}; the run stops; {last}; try a lower "
            "learning_rate"
        )
