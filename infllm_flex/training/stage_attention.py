"""Prepare the model for a stage: its number of positions and its attention."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import (
    LayerAttend,
    attend_through,
    describe,
    observe_attention,
    patch_model,
    unpatch_model,
)
from infllm_flex.training.parallel import World
from infllm_flex.training.parallel.context import ALWAYS_DENSE, ContextAttention
from infllm_flex.training.selection_loss import SelectionLoss
from infllm_flex.training.settings import StageSettings


def fit_positions(model: Any, name: str, length: int, rope_theta: float | None) -> None:
    """Make sure that a model has enough positions for a stage.

    Args:
        model: A transformers model.
        name: Name of the stage.
        length: Tokens per sequence.
        rope_theta: The new base of the rotary embedding, or None to leave it.

    Raises:
        ValueError: The model has too few positions, or no rotary embedding to change.
    """
    config = model.config
    available = getattr(config, "max_position_embeddings", length)
    if rope_theta is None:
        if available < length:
            raise ValueError(
                f"stages.{name}: the model has positions for {available} tokens, max_length asks "
                f"for {length}; set rope_theta to a larger base to extend it"
            )
        return
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    if rotary is None or parameters.get("rope_type") != "default":
        raise ValueError(
            f"stages.{name}: rope_theta needs a model with one rotary embedding of type default, "
            f"{type(model).__name__} has none"
        )
    config.rope_parameters = {**parameters, "rope_theta": rope_theta}
    config.max_position_embeddings = max(available, length)
    model.get_decoder().rotary_emb = type(rotary)(config=config).to(rotary.inv_freq.device)


@dataclass(frozen=True)
class StageAttention:
    """The attention of the model in a stage.

    Attributes:
        sparse_layers: Fraction of the attention layers that are sparse at ``max_length``.
        context_attention: Attention over sequences split among processes; None without context
            parallelism.
        selection_loss: The training signal for the selection; None where the stage has none.
    """

    sparse_layers: float
    context_attention: ContextAttention | None = None
    selection_loss: SelectionLoss | None = None


@contextlib.contextmanager
def stage_attention(
    model: nn.Module,
    stage: StageSettings,
    attention: InfLLMConfig,
    world: World | None = None,
    attend: LayerAttend | None = None,
    seed: int = 0,
) -> Iterator[StageAttention]:
    """Patch the model with the attention of a stage for the block.

    Args:
        model: A transformers model.
        stage: The stage, which has sparse or dense attention.
        attention: Settings of the sparse attention.
        world: The processes. None: this process alone.
        attend: Replaces the attention of a sparse stage, for example with another selection. It
            maps the number of a layer to a function for `infllm_flex.patch.attend_through`. Layers
            that cannot be sparse keep their own attention, as without it.
        seed: Seed of the queries that a selection loss looks at.

    Yields:
        The attention of the stage.

    Raises:
        UnsupportedModelError: No layer of the model can be sparse.
        ValueError: ``attend`` is given together with context parallelism or a selection loss, or a
            layer does not support context parallelism.
    """
    context_world = world if world is not None and world.context > 1 else None
    if attend is not None and context_world is not None:
        raise ValueError(
            f"attend needs whole sequences: set parallel.context to 1, got {context_world.context}"
        )
    loss = None
    if stage.selection_loss is not None:
        if attend is not None or context_world is not None:
            raise ValueError(
                "selection_loss needs whole sequences and the selection of the settings: leave out "
                "attend, and set parallel.context to 1"
            )
        loss = SelectionLoss(stage, attention, world, seed)
    if stage.attention == "dense":
        if context_world is None and loss is None:
            yield StageAttention(0.0)
            return
        attention = dataclasses.replace(attention, dense_len=ALWAYS_DENSE)
    patch_model(model, attention)
    try:
        fraction = 0.0
        if not attention.is_dense(stage.max_length):
            rows = describe(model)
            fraction = sum(row.sparse for row in rows) / len(rows)
        if attend is not None:
            with attend_through(model, attend, leave_others=True):
                yield StageAttention(fraction)
            return
        if loss is not None:
            with observe_attention(model, loss.observe):
                yield StageAttention(fraction, selection_loss=loss)
            return
        if context_world is None:
            yield StageAttention(fraction)
            return
        context_attention = ContextAttention(attention, context_world)
        with attend_through(model, lambda layer: context_attention):
            yield StageAttention(fraction, context_attention)
    finally:
        unpatch_model(model)


def warn_if_not_sparse(name: str, stage: StageSettings, attention: InfLLMConfig) -> None:
    """Warn if a stage asks for sparse attention but would compute dense attention."""
    if stage.attention == "dense":
        return
    length, budget = stage.max_length, attention.budget_tokens
    if attention.is_dense(length):
        warnings.warn(
            f"stages.{name}: attention will be dense: max_length = {length} is below "
            f"attention.dense_len = {attention.dense_len}",
            stacklevel=2,
        )
    elif budget >= length:
        warnings.warn(
            f"stages.{name}: every block will be selected: the budget of "
            f"{attention.num_selected} blocks of {attention.block_size} tokens = {budget} tokens "
            f"covers max_length = {length}",
            stacklevel=2,
        )
