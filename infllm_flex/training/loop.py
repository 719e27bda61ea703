"""The training loop: one process, one device, resumable at every step to the last bit."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex.training.data import Corpus, Sampler, load_corpus
from infllm_flex.training.folder import CHECKPOINTS, METRICS, check_folder, claim_folder
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
        checkpoint: Folder of the newest checkpoint, also a transformers model folder.
        signal: The signal that stopped the run early, 0 where it is complete.
    """

    step: int
    checkpoint: Path
    signal: int


def train(
    settings: TrainingSettings,
    *,
    resume: bool = False,
    corpus: Corpus | None = None,
    title: str = "training",
    show: bool = True,
) -> Outcome:
    """Train as the settings say and leave checkpoints and metrics in the run's folder.

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
    with Interruption() as interruption, claim_folder(settings) as folder:
        trainer = _Trainer(settings, folder, corpus or load_corpus(settings.data))
        return trainer.run(interruption, title, show)


class _Trainer:
    def __init__(self, settings: TrainingSettings, folder: Path, corpus: Corpus) -> None:
        self._settings, self._folder = settings, folder
        self._device = _device(settings.run.device)
        self._stream = corpus.train_stream()
        self._state = TrainingState(settings, folder / CHECKPOINTS, self._device)

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
            return Outcome(state.done, state.save(), interruption.signal)

    def _run_stage(
        self,
        name: str,
        stage: StageSettings,
        interruption: Interruption,
        progress: Progress,
        metrics: MetricsFile,
    ) -> None:
        settings, state = self._settings, self._state
        sampler = Sampler(self._stream, stage.max_length, settings.run.seed, name)
        with stage_attention(state.model, stage, settings.attention) as sparse_layers:
            while not interruption.signal:
                position = position_of(settings.stages, state.done)
                if position is None or position.name != name:
                    return
                batch = sampler.batch(position.sample_indices()).to(self._device)
                loss, norm = self._step(batch, position.learning_rate)
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

    def _step(self, batch: Tensor, learning_rate: float) -> tuple[float, float]:
        logits = self._state.model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
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
