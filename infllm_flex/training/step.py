"""One optimizer step over the batch of all processes, in as many passes as memory asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from infllm_flex.training.data import Batch
from infllm_flex.training.parallel import World
from infllm_flex.training.parallel.context import ContextAttention, part_of
from infllm_flex.training.parallel.wrap import gradients_later
from infllm_flex.training.schedule import Position
from infllm_flex.training.state import TrainingState


class NotFiniteError(ArithmeticError):
    """The loss or its gradient is NaN or infinite; no weight was changed."""


def take_step(
    state: TrainingState,
    world: World,
    batch: Batch,
    position: Position,
    share: ContextAttention | None = None,
) -> tuple[float, float]:
    """Compute the loss and its gradient, and change the weights.

    Args:
        state: Model and optimizer.
        world: The processes, each of which calls this at the same step.
        batch: This process's sequences, or those that it has part in, on the CPU.
        position: The step.
        share: What attends where several processes share a sequence.

    Returns:
        The mean cost of the batch of all processes, in nats per token, whatever the weights of
        its labels, and the norm of the gradient.

    Raises:
        NotFiniteError: One of the two is not finite.
    """
    # A sequence that several processes share is counted by the first of them.
    mine = batch.num_labels if world.context_rank == 0 else 0
    count = world.sum(torch.tensor(mine, device=world.device))
    total = torch.zeros((), device=world.device)
    passes = list(_passes(batch, position.stage.sequences_at_once))
    for number, some in enumerate(passes):
        if share is not None:
            share.begin(some.input_ids.shape[1], some.position_ids)
        labels = part_of(some.labels, world).to(world.device)
        weights = some.weights
        if weights is not None:
            weights = part_of(weights, world).to(world.device)
        with gradients_later(state.loss, number + 1 < len(passes)):
            # Of a batch with weights, the weighted sum and the plain one.
            sums = torch.atleast_1d(state.loss(labels, weights, **_inputs(some, world)))
            # The processes' gradients are averaged, and shall be added.
            (sums[0] * (world.size / count)).backward()
        total += sums[-1].detach()
    mean = float(world.sum(total) / count)
    if not math.isfinite(mean):
        raise NotFiniteError(f"the loss is {mean}")
    norm = state.optimizers.step(position.learning_rate)
    if not math.isfinite(norm):
        raise NotFiniteError(f"the gradient is {norm}")
    return mean, norm


def _passes(batch: Batch, at_once: int) -> Iterator[Batch]:
    rows = len(batch.input_ids)
    for first in range(0, rows, at_once or rows):
        yield batch.rows(slice(first, first + (at_once or rows)))


def _inputs(batch: Batch, world: World) -> dict[str, Any]:
    """What the model is given: this process's part of the sequences, and where it stands."""
    if world.context == 1:
        return batch.to(world.device).model_inputs()
    ids, positions = batch.input_ids, batch.position_ids
    if positions is None:
        positions = torch.arange(ids.shape[1])[None]
    positions = part_of(positions, world).to(world.device)
    ids = part_of(ids, world).to(world.device)
    return {
        "input_ids": ids,
        "position_ids": positions,
        # Without a mask transformers takes a gap in the positions for the border of two documents.
        "attention_mask": torch.ones_like(ids),
        "use_cache": False,
    }
