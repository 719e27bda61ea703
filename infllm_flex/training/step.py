"""One optimizer step over the batch of all processes, with gradient accumulation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from infllm_flex.training.data import Batch
from infllm_flex.training.parallel import World
from infllm_flex.training.parallel.context import local_chunks
from infllm_flex.training.parallel.wrap import defer_gradient_sync
from infllm_flex.training.schedule import Position
from infllm_flex.training.stage_attention import StageAttention
from infllm_flex.training.state import TrainingState


class NotFiniteError(ArithmeticError):
    """The loss or its gradient is NaN or infinite; no weight has changed."""


def take_step(
    state: TrainingState,
    world: World,
    batch: Batch,
    position: Position,
    attention: StageAttention,
) -> tuple[float, float]:
    """Compute the loss and its gradient, and update the weights.

    Args:
        state: Model and optimizers.
        world: The processes; all of them must call this at the same step.
        batch: The sequences of this process, on the CPU. With context parallelism, the whole
            sequences of which it processes a part.
        position: The step.
        attention: What `stage_attention` yields, inside its block.

    Returns:
        The mean loss over the labels of all processes in nats per token, label weights ignored,
        and the norm of the gradient.

    Raises:
        NotFiniteError: One of the two is not finite.
    """
    # The first process of a context group counts the labels of its sequences.
    own_count = batch.num_labels if world.context_rank == 0 else 0
    count = world.sum(torch.tensor(own_count, device=world.device))
    if attention.selection_loss is not None:
        attention.selection_loss.begin_step(position)
    total = torch.zeros((), device=world.device)
    micro_batches = list(_micro_batches(batch, position.stage.sequences_at_once))
    for number, micro_batch in enumerate(micro_batches):
        if attention.context_attention is not None:
            attention.context_attention.set_documents(
                micro_batch.input_ids.shape[1], micro_batch.position_ids
            )
        if attention.selection_loss is not None:
            attention.selection_loss.set_batch(micro_batch, world.device)
        labels = local_chunks(micro_batch.labels, world).to(world.device)
        weights = micro_batch.weights
        if weights is not None:
            weights = local_chunks(weights, world).to(world.device)
        with defer_gradient_sync(state.loss, number + 1 < len(micro_batches)):
            # With label weights, the loss returns the weighted sum and the plain sum.
            sums = torch.atleast_1d(state.loss(labels, weights, **_inputs(micro_batch, world)))
            # DDP and FSDP average gradients over ranks; multiply by the world size to sum them.
            (sums[0] * (world.size / count)).backward()
        total += sums[-1].detach()
    mean = float(world.sum(total) / count)
    if not math.isfinite(mean):
        raise NotFiniteError(f"the loss is {mean}")
    norm = state.optimizers.step(position.learning_rate)
    if not math.isfinite(norm):
        raise NotFiniteError(f"the gradient is {norm}")
    return mean, norm


def _micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    rows = len(batch.input_ids)
    for start in range(0, rows, size or rows):
        yield batch.rows(slice(start, start + (size or rows)))


def _inputs(batch: Batch, world: World) -> dict[str, Any]:
    """Keyword arguments of the model: this process's part of the sequences and its positions."""
    if world.context == 1:
        return batch.to(world.device).model_inputs()
    ids, positions = batch.input_ids, batch.position_ids
    if positions is None:
        positions = torch.arange(ids.shape[1])[None]
    positions = local_chunks(positions, world).to(world.device)
    ids = local_chunks(ids, world).to(world.device)
    return {
        "input_ids": ids,
        "position_ids": positions,
        # Without a mask, transformers takes a gap in the positions for a document boundary.
        "attention_mask": torch.ones_like(ids),
        "use_cache": False,
    }
