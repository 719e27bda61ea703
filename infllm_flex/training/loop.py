"""The training loop: one process, one device, resumable at every step to the last bit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex.training import checkpoints
from infllm_flex.training.data import Corpus, Sampler, load_corpus
from infllm_flex.training.folder import CHECKPOINTS, METRICS, check_folder, claim_folder
from infllm_flex.training.interruption import Interruption
from infllm_flex.training.metrics import MetricsFile, Progress
from infllm_flex.training.model import (
    build_model,
    config_json,
    stage_attention,
    warn_of_no_effect,
)
from infllm_flex.training.optim import Optimizers
from infllm_flex.training.schedule import Position, position_of
from infllm_flex.training.settings import TrainingSettings


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
        trainer.restore()
        return trainer.run(interruption, title, show)


class _Trainer:
    def __init__(self, settings: TrainingSettings, folder: Path, corpus: Corpus) -> None:
        self._settings, self._folder = settings, folder
        self._device = _device(settings.run.device)
        self._stream = corpus.train_stream()
        torch.manual_seed(settings.run.seed)
        longest = max(stage.max_length for stage in settings.stages.values())
        self._model = build_model(settings.model, longest, self._device)
        self._optimizers = Optimizers(self._model, settings.optim)
        self._done, self._saved = 0, -1

    def restore(self) -> None:
        path = checkpoints.newest(self._folder / CHECKPOINTS)
        if path is None:
            return
        found = checkpoints.load(path)
        if found.optimizer:
            self._optimizers.load_tensors(found.optimizer)
        with torch.no_grad():
            for name, weight in _weights(self._model).items():
                weight.copy_(found.weights[name])
        torch.set_rng_state(found.random_state["cpu"])
        if self._device.type == "cuda" and "cuda" in found.random_state:
            torch.cuda.set_rng_state(found.random_state["cuda"], self._device)
        self._done = self._saved = found.step

    def run(self, interruption: Interruption, title: str, show: bool) -> Outcome:
        settings = self._settings
        metrics = MetricsFile(self._folder / METRICS, self._done)
        with Progress(title, settings.total_steps, self._done, show) as progress:
            try:
                while position := position_of(settings.stages, self._done):
                    self._run_stage(position, interruption, progress, metrics)
                    if interruption.signal:
                        break
                return Outcome(self._done, self._save(), interruption.signal)
            finally:
                metrics.close()

    def _run_stage(
        self,
        position: Position | None,
        interruption: Interruption,
        progress: Progress,
        metrics: MetricsFile,
    ) -> None:
        assert position is not None
        settings, name, stage = self._settings, position.name, position.stage
        if position.step == 0:
            self._optimizers = Optimizers(self._model, settings.optim)
        sampler = Sampler(self._stream, stage.max_length, settings.run.seed, name)
        progress.restart()
        with stage_attention(self._model, stage, settings.attention) as sparse_share:
            while position and position.name == name and not interruption.signal:
                batch = sampler.batch(position.sample_indices()).to(self._device)
                loss, norm = self._step(batch, position)
                self._done += 1
                progress.advance(loss, stage.tokens_per_step)
                if self._done % settings.log.every == 0 or self._done == settings.total_steps:
                    metrics.write(
                        {
                            "step": self._done,
                            "stage": name,
                            "loss": loss,
                            "bits_per_byte": loss / math.log(2),
                            "gradient_norm": norm,
                            "learning_rate": position.learning_rate,
                            "tokens_per_second": round(progress.tokens_per_second),
                            "sparse_layers": sparse_share,
                        }
                    )
                position = position_of(settings.stages, self._done)
                if self._done % settings.checkpoint.every == 0:
                    self._save()

    def _step(self, batch: Tensor, position: Position) -> tuple[float, float]:
        logits = self._model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()
            norm = self._optimizers.step(position.learning_rate)
            if math.isfinite(norm):
                return value, norm
            raise self._diverged("the gradient", norm)
        raise self._diverged("the loss", value)

    def _diverged(self, what: str, value: float) -> TrainingDivergedError:
        last = (
            f"its last checkpoint is that of step {self._saved}"
            if self._saved >= 0
            else ("there is no checkpoint yet")
        )
        return TrainingDivergedError(
            f"{what} of step {self._done + 1} is {value}: the run stops, {last}; "
            "a lower learning_rate or clip_norm may help"
        )

    def _save(self) -> Path:
        settings = self._settings
        folder = self._folder / CHECKPOINTS
        if self._saved == self._done:
            path = checkpoints.newest(folder)
            assert path is not None
            return path
        position = position_of(settings.stages, self._done)
        sparse = any(stage.attention == "sparse" for stage in settings.stages.values())
        random_state = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self._device)
        checkpoint = checkpoints.Checkpoint(
            step=self._done,
            weights=_weights(self._model),
            # The next stage starts with a fresh optimizer, a finished run needs none.
            optimizer=self._optimizers.tensors() if position and position.step else {},
            config_json=config_json(self._model, settings.attention if sparse else None),
            random_state=random_state,
        )
        path = checkpoints.save(folder, checkpoint, settings.checkpoint.keep)
        self._saved = self._done
        return path


def _weights(model: Any) -> dict[str, Tensor]:
    """Every saved tensor by name; tied weights under their first name only, as they load."""
    found: dict[str, Tensor] = {}
    seen = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: cuda is not available here; use cpu or auto")
    return torch.device(name)
