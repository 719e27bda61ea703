"""The selection loss of a stage: which queries it looks at, its gradient, and what is logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infllm_flex.autocast import as_autocast
from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.layer_state import Observe
from infllm_flex.training.data import Batch
from infllm_flex.training.data.mixing import seed_of
from infllm_flex.training.parallel import World
from infllm_flex.training.schedule import Position
from infllm_flex.training.selection_loss.divergence import selection_loss
from infllm_flex.training.selection_loss.sampled_queries import SampledQueries, draw_positions
from infllm_flex.training.settings import StageSettings
from infllm_flex.validation import resolve_scale


class SelectionLoss:
    """Adds the gradient of the selection loss to that of a stage's loss, layer by layer.

    The loss enters where a layer's output leaves the attention function: the output keeps its bits,
    and in the backward pass the gradients of the selection loss are added to those of its queries
    and keys. Checkpointed layers compute it once, sharded ones where their weights are gathered.

    Args:
        stage: The stage, which has a ``selection_loss``.
        config: Sparsity settings.
        world: The processes. None: this process alone.
        seed: Seed of the queries that are drawn.
    """

    def __init__(
        self, stage: StageSettings, config: InfLLMConfig, world: World | None, seed: int
    ) -> None:
        assert stage.selection_loss is not None
        self._settings, self._stage, self._config = stage.selection_loss, stage, config
        self._ranks = 1 if world is None else world.size
        self._seed = seed
        self._token: Tensor | None = None
        self._queries: SampledQueries | None = None
        self._losses: dict[int, Tensor] = {}  # by layer, the sum over micro-batches
        self._layers = 0

    def observe(self, layer: int) -> Observe:
        """Return what `infllm_flex.patch.observe_attention` calls in a layer."""
        self._layers = max(self._layers, layer + 1)

        @torch.compiler.disable
        def observe(out: Tensor, query: Tensor, key: Tensor, scale: float | None) -> Tensor:
            if self._queries is None or not torch.is_grad_enabled():
                return out
            if not query.requires_grad and not key.requires_grad:
                return out  # neither can learn
            sampled = as_autocast(query).index_select(2, self._queries.token)
            scale = resolve_scale(query, scale)
            return _AddGradients.apply(
                out, sampled, as_autocast(key), self, layer, self._queries, scale
            )

        return observe

    def begin_step(self, position: Position) -> None:
        """Draw the queries of a step, or none if it is a step without the loss."""
        self._losses.clear()
        self._token = self._queries = None
        if position.step % self._settings.every == 0:
            # A function of the step, so that a resumed run draws the same.
            seed = seed_of(f"{self._seed}/{position.name}/selection loss/{position.step}")
            length = self._stage.max_length
            self._token = draw_positions(length, self._settings.queries, seed)

    def set_batch(self, batch: Batch, device: torch.device) -> None:
        """Set the micro-batch of the next forward pass, on the CPU."""
        if self._token is not None:
            self._queries = SampledQueries.of_batch(self._token, batch, self._config, device)

    def values(self, world: World) -> dict[str, Any]:
        """Return what is logged of the last step; all processes must call this in the same step.

        Returns:
            ``selection_loss``: the loss before its weight, in nats; ``selection_loss_by_layer``.
            Nothing if it was a step without the loss.
        """
        if self._token is None:
            return {}
        nothing = torch.zeros((), device=world.device)
        losses = [self._losses.get(layer, nothing) for layer in range(self._layers)]
        by_layer = world.sum(torch.stack(losses)).tolist()
        return {
            "selection_loss": sum(by_layer) / len(by_layer),
            "selection_loss_by_layer": by_layer,
        }

    def gradients(
        self, query: Tensor, key: Tensor, layer: int, queries: SampledQueries, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients for sampled queries and for keys, and note the loss."""
        found = selection_loss(query, key, queries, self._config, scale)
        # Queries without a choice count as zeros, so that no process must know of the others'.
        count = self._stage.batch_size * self._settings.queries * key.shape[1]
        before = self._losses.get(layer)
        self._losses[layer] = found.loss / count + (0 if before is None else before)
        # DDP and FSDP average gradients over ranks.
        factor = self._settings.weight * self._ranks / (count * self._layers)
        return found.query * factor, found.key * factor


class _AddGradients(torch.autograd.Function):
    """Return ``out``; in backward, give queries and keys the gradients of the selection loss."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        query: Tensor,
        key: Tensor,
        loss: SelectionLoss,
        layer: int,
        queries: SampledQueries,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key)
        ctx.compute = lambda q, k: loss.gradients(q, k, layer, queries, scale)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key = ctx.compute(*ctx.saved_tensors)
        return grad, query, key, None, None, None, None
