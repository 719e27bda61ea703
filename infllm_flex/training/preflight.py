"""Everything that can be known to go wrong before any work is done."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

from infllm_flex.training.data import check_vocabulary, open_text
from infllm_flex.training.flops import Work, document_lengths
from infllm_flex.training.layer_transforms import check_float8
from infllm_flex.training.loss import LanguageLoss
from infllm_flex.training.memory_estimate import estimate_memory
from infllm_flex.training.model import build_outline, decoder_layers
from infllm_flex.training.model_config import find_model
from infllm_flex.training.parallel import World, check_processes, pick_device
from infllm_flex.training.settings import StageSettings, TrainingSettings
from infllm_flex.training.stage_attention import fit_positions, stage_attention, warn_of_no_effect


def check_run(settings: TrainingSettings, world: World) -> Any:
    """Try everything on the model's outline, which has no weights.

    Args:
        settings: The whole run.
        world: The processes.

    Returns:
        The outline, on the meta device, as the last stage has it.

    Raises:
        ValueError: The model does not fit the stages, or the settings one another.
        UnsupportedModelError: A stage is to be sparse, and no layer of the model can be.
    """
    if settings.model.float8:
        check_float8(world.device)
    for name, stage in settings.stages.items():
        warn_of_no_effect(name, stage, settings.attention)
        _warn_of_no_schedule(name, stage)
    first = next(iter(settings.stages.values()))
    outline = build_outline(settings.model, first.max_length)
    decoder_layers(outline)
    LanguageLoss(outline)
    for name, stage in settings.stages.items():
        fit_positions(outline, name, stage.max_length, stage.rope_theta)
        with stage_attention(outline, stage, settings.attention, world):
            pass
    return outline


def rehearse(settings: TrainingSettings, processes: int) -> list[str]:
    """Everything up to the first step, for any number of processes, without weights.

    Returns:
        What was found, in lines for the user.

    Raises:
        ValueError: What `check_run` and the data refuse.
    """
    check_processes(settings, processes)
    settings = find_model(settings)
    world = World(
        pick_device(settings.run.device), size=processes, context=settings.parallel.context
    )
    outline = check_run(settings, world)
    weights = sum(weight.numel() for weight in outline.parameters())
    memory = estimate_memory(outline, settings, processes, world.device)
    lines = [
        f"model: {type(outline).__name__}, {weights / 1e9:.3g} billion weights",
        f"memory, estimated: {memory}",
    ]
    with tempfile.TemporaryDirectory() as aside:
        text = open_text(settings.data, Path(aside), settings.model.path)
        check_vocabulary(text, outline.config.vocab_size)
        for name, stage in settings.stages.items():
            rows = stage.batch_size // world.data_size
            rows = min(rows, stage.sequences_at_once or rows)
            batch = text.sampler(name, stage, settings.run.seed).batch(range(rows))
            lengths = document_lengths(stage.max_length, rows, batch.position_ids)
            sparse = Work(outline, stage, settings.attention).sparse_tokens(lengths)
            lines.append(
                f"{name}: first batch of a process {rows} x {stage.max_length} tokens in "
                f"{len(lengths)} documents, {sparse / (rows * stage.max_length):.0%} of them sparse"
            )
    return lines


def _warn_of_no_schedule(name: str, stage: StageSettings) -> None:
    if stage.warmup_steps == stage.decay_steps == 0:
        warnings.warn(
            f"stages.{name}: the learning rate is {stage.learning_rate} from the first step to the "
            "last: set warmup_steps and decay_steps for a schedule",
            stacklevel=2,
        )
