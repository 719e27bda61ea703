"""Training of one variant by the project's own loop."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from evaluation.quality.arms import Way
from evaluation.quality.mixture import Mixture
from evaluation.quality.settings import QualitySettings
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
    TrainingSettings,
)

_LOGITS_MIB = 512  # of a small model on a large GPU: few parts, little time between them


def training_settings(
    settings: QualitySettings, way: Way, seed: int, base: Path, folder: Path, device: torch.device
) -> TrainingSettings:
    """The recipe of one variant.

    Args:
        settings: The whole comparison.
        way: How the model attends while it is trained.
        seed: Of the samples.
        base: The folder of the base.
        folder: Of the training.
        device: Where it happens.
    """
    tuning = settings.tuning
    arithmetic = tuning.arithmetic
    if arithmetic == "auto":
        arithmetic = "bfloat16" if device.type == "cuda" else "weights"
    place: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    stage = StageSettings(
        max_length=tuning.length,
        batch_size=tuning.batch_size,
        sequences_at_once=tuning.sequences_at_once,
        steps=tuning.steps,
        learning_rate=tuning.learning_rate,
        attention="dense" if way.attention is None else "sparse",
        warmup_steps=tuning.warmup_steps,
        decay_steps=tuning.steps - tuning.warmup_steps,
    )
    return TrainingSettings(
        run=RunSettings(folder=folder, seed=seed, device=place, compile=tuning.compile),
        model=ModelSettings(path=base, arithmetic=arithmetic),
        stages={"long": stage},
        attention=way.attention or InfLLMConfig(),
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


def tune(recipe: TrainingSettings, way: Way, mixture: Mixture, title: str) -> Outcome:
    """Train, or go on."""
    return train(recipe, resume=True, text=mixture, attend=way.attend, title=title)
