"""What a stage asks of the model: positions for its length, and its attention."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import describe, patch_model, unpatch_model
from infllm_flex.training.settings import StageSettings


def fit_positions(model: Any, name: str, length: int, rope_theta: float | None) -> None:
    """Make sure that a model knows the positions of a stage.

    Args:
        model: A transformers model.
        name: The stage.
        length: Tokens per sequence.
        rope_theta: The new base of the rotary embedding, or None to leave it.

    Raises:
        ValueError: The model has too few positions, or no rotary embedding to change.
    """
    config = model.config
    known = getattr(config, "max_position_embeddings", length)
    if rope_theta is None:
        if known < length:
            raise ValueError(
                f"stages.{name}: the model has positions for {known} tokens, max_length asks for "
                f"{length}; a larger rope_theta lets it reach further"
            )
        return
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    if rotary is None or parameters.get("rope_type") != "default":
        raise ValueError(
            f"stages.{name}: rope_theta can be set for models with one plain rotary embedding, "
            f"{type(model).__name__} has none"
        )
    config.rope_parameters = {**parameters, "rope_theta": rope_theta}
    config.max_position_embeddings = max(known, length)
    model.get_decoder().rotary_emb = type(rotary)(config=config).to(rotary.inv_freq.device)


@contextlib.contextmanager
def stage_attention(
    model: nn.Module, stage: StageSettings, attention: InfLLMConfig
) -> Iterator[float]:
    """Give the model the attention of a stage for the block.

    Yields:
        The share of its attention layers that attend sparsely at the stage's length.
    """
    if stage.attention == "dense":
        yield 0.0
        return
    patch_model(model, attention)
    try:
        rows = describe(model)
        share = sum(row.sparse for row in rows) / len(rows)
        yield 0.0 if attention.is_dense(stage.max_length) else share
    finally:
        unpatch_model(model)


def warn_of_no_effect(name: str, stage: StageSettings, attention: InfLLMConfig) -> None:
    """Warn where a stage asks for sparse attention but would compute dense attention."""
    if stage.attention == "dense":
        return
    length, budget = stage.max_length, attention.num_selected * attention.block_size
    if attention.is_dense(length):
        warnings.warn(
            f"stages.{name}: nothing will be sparse: max_length = {length} is below "
            f"attention.dense_len = {attention.dense_len}",
            stacklevel=2,
        )
    elif budget >= length:
        warnings.warn(
            f"stages.{name}: every block will be selected: the budget of "
            f"{attention.num_selected} blocks of {attention.block_size} = {budget} tokens covers "
            f"max_length = {length}",
            stacklevel=2,
        )
