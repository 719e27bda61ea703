"""Training of one variant by the project's training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from evaluation.quality.arms import AttentionMode, attention_modes, trained
from evaluation.quality.mixture import Mixture
from evaluation.quality.names import RULER_TASKS
from evaluation.quality.ruler import missing_packages
from evaluation.quality.settings import QualitySettings, TuningSettings
from infllm_flex.config import InfLLMConfig
from infllm_flex.training.loop import Outcome, train
from infllm_flex.training.settings import (
    CheckpointSettings,
    DataSettings,
    LogSettings,
    MemorySettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    StageSettings,
    TinyModelSettings,
    TrainingSettings,
)

_LOGITS_MIB = 512  # large, since a small model on a large GPU is fastest with few chunks of logits


def training_settings(
    settings: QualitySettings,
    mode: AttentionMode,
    seed: int,
    base: Path,
    folder: Path,
    device: torch.device,
) -> TrainingSettings:
    """Return the training settings of one variant.

    Args:
        settings: All settings.
        mode: The model's attention in training.
        seed: Seed of the samples.
        base: Folder of the base.
        folder: Folder of the training run.
        device: Device of the training.
    """
    tuning = settings.tuning
    assert tuning is not None  # else nothing is trained
    arithmetic = tuning.arithmetic
    if arithmetic == "auto":
        arithmetic = "bfloat16" if device.type == "cuda" else "weights"
    place: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    return TrainingSettings(
        run=RunSettings(folder=folder, seed=seed, device=place, compile=tuning.compile),
        model=ModelSettings(path=base, arithmetic=arithmetic),
        stages={"long": _stage(tuning, mode)},
        attention=mode.attention or InfLLMConfig(),
        data=DataSettings(workers=tuning.workers),
        optim=OptimSettings(
            beta2=tuning.beta2, weight_decay=tuning.weight_decay, clip_norm=tuning.clip_norm
        ),
        memory=MemorySettings(
            activation_checkpointing=tuning.checkpointing, logits_mib=_LOGITS_MIB
        ),
        checkpoint=CheckpointSettings(every=max(1, tuning.steps)),
        log=LogSettings(every=10, tensorboard=False),
    )


def _stage(tuning: TuningSettings, mode: AttentionMode) -> StageSettings:
    return StageSettings(
        max_length=tuning.length,
        batch_size=tuning.batch_size,
        sequences_at_once=tuning.sequences_at_once,
        steps=tuning.steps,
        learning_rate=tuning.learning_rate,
        attention="dense" if mode.attention is None else "sparse",
        warmup_steps=tuning.warmup_steps,
        decay_steps=tuning.steps - tuning.warmup_steps,
        selection_loss=mode.selection_loss,
    )


def check_recipes(settings: QualitySettings) -> None:
    """Check what every variant's stage asks for, before there is a base to train.

    Raises:
        ValueError: Names the variant and the setting.
    """
    if settings.tuning is None:
        return
    asks_ruler = any(task in RULER_TASKS for task in settings.tuning.tasks)
    if asks_ruler and (reason := missing_packages()):
        raise ValueError(f"tuning.tasks: {reason}")
    for name in trained(settings):
        mode = attention_modes(settings)[name]
        try:
            TrainingSettings(
                run=RunSettings(folder=Path()),
                model=ModelSettings(tiny=TinyModelSettings()),
                stages={"long": _stage(settings.tuning, mode)},
                attention=mode.attention or InfLLMConfig(),
            )
        except ValueError as error:
            raise ValueError(f"variants.{name}: {error}") from error


def tune(recipe: TrainingSettings, mode: AttentionMode, mixture: Mixture, title: str) -> Outcome:
    """Train, or resume an interrupted training."""
    return train(recipe, resume=True, text=mixture, attend=mode.attend, title=title)
