"""What a stage asks of the model: positions for its length, and its attention."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import LayerAttend, attend_through, describe, patch_model, unpatch_model
from infllm_flex.training.parallel import World
from infllm_flex.training.parallel.context import ALWAYS_DENSE, ContextAttention
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


@dataclass(frozen=True)
class StageAttention:
    """How the model attends in a stage.

    Attributes:
        sparse_layers: The share of its attention layers that attend sparsely at full length.
        share: What attends where several processes share a sequence.
    """

    sparse_layers: float
    share: ContextAttention | None = None


@contextlib.contextmanager
def stage_attention(
    model: nn.Module,
    stage: StageSettings,
    attention: InfLLMConfig,
    world: World | None = None,
    attend: LayerAttend | None = None,
) -> Iterator[StageAttention]:
    """Give the model the attention of a stage for the block.

    Args:
        model: A transformers model.
        stage: Says whether attention is sparse.
        attention: Settings of the sparse attention.
        world: The processes, where some of them may share a sequence.
        attend: What attends in a sparse stage instead, say to another choice of blocks: for the
            number of a layer, a function as `infllm_flex.patch.attend_through` takes it.

    Yields:
        What it is.

    Raises:
        UnsupportedModelError: No layer of the model can be sparse.
        ValueError: Sequences are shared or ``attend`` is given, and a layer cannot attend so, or
            both are.
    """
    group = world if world is not None and world.context > 1 else None
    if attend is not None and group is not None:
        raise ValueError(
            "attention of one's own needs whole sequences: set parallel.context to 1, got "
            f"{group.context}"
        )
    if stage.attention == "dense":
        if group is None:
            yield StageAttention(0.0)
            return
        attention = dataclasses.replace(attention, dense_len=ALWAYS_DENSE)
    patch_model(model, attention)
    try:
        rows = describe(model)
        share = sum(row.sparse for row in rows) / len(rows)
        share = 0.0 if attention.is_dense(stage.max_length) else share
        if attend is not None:
            with attend_through(model, attend):
                yield StageAttention(share)
            return
        if group is None:
            yield StageAttention(share)
            return
        together = ContextAttention(attention, group)
        with attend_through(model, lambda layer: together):
            yield StageAttention(share, together)
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
