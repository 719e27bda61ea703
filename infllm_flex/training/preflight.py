"""Checks of a run before it loads weights."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

from infllm_flex.training.data import check_vocabulary, open_text
from infllm_flex.training.flops import FlopCounter, document_lengths
from infllm_flex.training.layer_transforms import check_float8
from infllm_flex.training.loss import LanguageLoss
from infllm_flex.training.memory_estimate import estimate_memory
from infllm_flex.training.model import build_meta_model, decoder_layers
from infllm_flex.training.model_config import find_model
from infllm_flex.training.model_weights import check_weights
from infllm_flex.training.parallel import World, check_processes, pick_device
from infllm_flex.training.settings import StageSettings, TrainingSettings
from infllm_flex.training.stage_attention import fit_positions, stage_attention, warn_if_not_sparse


def check_run(settings: TrainingSettings, world: World) -> Any:
    """Check the settings on a model without weights.

    Args:
        settings: Settings of the run, with ``model.hub`` resolved by `find_model`.
        world: The processes.

    Returns:
        The model on the meta device, prepared for the last stage.

    Raises:
        ValueError: The model does not support a stage, its folder lacks weights, or settings
            contradict each other.
        UnsupportedModelError: A stage is sparse, and the model has no layer that can be.
    """
    if settings.model.float8:
        check_float8(world.device)
    for name, stage in settings.stages.items():
        warn_if_not_sparse(name, stage, settings.attention)
        _warn_if_no_schedule(name, stage)
    first = next(iter(settings.stages.values()))
    model = build_meta_model(settings.model, first.max_length)
    decoder_layers(model)
    LanguageLoss(model)
    for name, stage in settings.stages.items():
        fit_positions(model, name, stage.max_length, stage.rope_theta)
        with stage_attention(model, stage, settings.attention, world):
            pass
    if settings.model.path is not None:
        check_weights(settings.model.path, "model.path")
    return model


def dry_run(settings: TrainingSettings, processes: int) -> list[str]:
    """Do everything up to the first step, without weights, as for ``processes`` processes.

    Returns:
        Lines to show to the user: model, estimated memory and the first batch of each stage.

    Raises:
        ValueError: As `check_run`, or the text cannot be used.
    """
    check_processes(settings, processes)
    settings = find_model(settings)
    world = World(
        pick_device(settings.run.device), size=processes, context=settings.parallel.context
    )
    model = check_run(settings, world)
    weights = sum(weight.numel() for weight in model.parameters())
    memory = estimate_memory(model, settings, processes, world.device)
    lines = [
        f"model: {type(model).__name__}, {weights / 1e9:.3g} billion weights",
        f"memory, estimated: {memory}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        text = open_text(settings.data, Path(folder), settings.model.path)
        check_vocabulary(text, model.config.vocab_size)
        for name, stage in settings.stages.items():
            rows = stage.batch_size // world.data_size
            rows = min(rows, stage.sequences_at_once or rows)
            batch = text.sampler(name, stage, settings.run.seed).batch(range(rows))
            lengths = document_lengths(stage.max_length, rows, batch.position_ids)
            sparse = FlopCounter(model, stage, settings.attention).sparse_tokens(lengths)
            lines.append(
                f"{name}: first batch of a process {rows} x {stage.max_length} tokens in "
                f"{len(lengths)} documents, {sparse / (rows * stage.max_length):.0%} of them sparse"
            )
    return lines


def _warn_if_no_schedule(name: str, stage: StageSettings) -> None:
    if stage.warmup_steps == stage.decay_steps == 0:
        warnings.warn(
            f"stages.{name}: the learning rate is constant, {stage.learning_rate}: set "
            "warmup_steps and decay_steps for a schedule",
            stacklevel=2,
        )
