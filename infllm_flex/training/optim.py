"""Optimizers, and their state as named tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from infllm_flex.training.parallel.weights import full
from infllm_flex.training.settings import OptimSettings


class Optimizers:
    """The one or two optimizers of a run behind one interface.

    Args:
        model: The model to train.
        settings: The ``optim`` section.
    """

    def __init__(self, model: Any, settings: OptimSettings) -> None:
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._clip_norm = settings.clip_norm
        self._parts = _build(model, self._weights, settings)

    def step(self, learning_rate: float) -> float:
        """Clip the gradients, update the weights and clear the gradients.

        Returns:
            The norm of the gradients before clipping. If it is not finite, no weight changes.
        """
        norm = float(full(nn.utils.clip_grad_norm_(self._weights, self._clip_norm)))
        if math.isfinite(norm):
            self._set_learning_rate(learning_rate)
            for part in self._parts:
                part.step()
        for part in self._parts:
            part.zero_grad(set_to_none=True)
        return norm

    def _set_learning_rate(self, learning_rate: float) -> None:
        for part in self._parts:
            for group in part.param_groups:
                if isinstance(group["lr"], Tensor):  # torchao compiles its step with this tensor
                    group["lr"].fill_(learning_rate)
                else:
                    group["lr"] = learning_rate

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, as views: ``<optimizer>.<index of the weight>.<moment>``."""
        tensors: dict[str, Tensor] = {}
        for number, part in enumerate(self._parts):
            weights = [weight for group in part.param_groups for weight in group["params"]]
            for index, weight in enumerate(weights):
                for moment, value in sorted(part.state.get(weight, {}).items()):
                    tensors.update(_flatten(f"{number}.{index}.{moment}", value))
        return tensors

    def materialise(self) -> None:
        """Allocate the state of fresh optimizers, so that a checkpoint can be read into `tensors`.

        This may change the weights, so they must be read from the checkpoint too.
        """
        # A step with zero gradients allocates it in each optimizer's own layout.
        for weight in self._weights:
            weight.grad = torch.zeros_like(weight)
        self.step(0.0)


def _flatten(name: str, value: Tensor) -> dict[str, Tensor]:
    if isinstance(value, DTensor):
        local = value.to_local()
        if not hasattr(local, "__tensor_flatten__"):
            return {name: value}
        # Quantisation blocks may straddle shards, so 8-bit state resumes only on the same number
        # of processes.
        return _flatten(f"{name}.part{dist.get_rank()}of{dist.get_world_size()}", local)
    if hasattr(value, "__tensor_flatten__"):
        inner, _ = value.__tensor_flatten__()
        return {f"{name}.{part}": getattr(value, part) for part in inner}
    return {name: value}


def _build(
    model: Any, weights: list[nn.Parameter], settings: OptimSettings
) -> list[torch.optim.Optimizer]:
    betas = (settings.beta1, settings.beta2)
    if settings.kind == "muon":
        embeddings = {id(model.get_input_embeddings().weight)}
        if model.get_output_embeddings() is not None:
            embeddings.add(id(model.get_output_embeddings().weight))
        matrices = [w for w in weights if w.ndim == 2 and id(w) not in embeddings]
        rest = [w for w in weights if w.ndim != 2 or id(w) in embeddings]
        muon = torch.optim.Muon(
            matrices,
            lr=0.0,
            weight_decay=settings.weight_decay,
            # Scales the updates to the size of AdamW's, so that one learning rate serves both.
            adjust_lr_fn="match_rms_adamw",
        )
        return [muon, torch.optim.AdamW(_groups(rest, settings), lr=0.0, betas=betas, fused=True)]
    if settings.kind == "adamw8bit":
        from torchao.optim import AdamW8bit

        return [AdamW8bit(_groups(weights, settings), lr=0.0, betas=betas)]
    return [torch.optim.AdamW(_groups(weights, settings), lr=0.0, betas=betas, fused=True)]


def _groups(weights: list[nn.Parameter], settings: OptimSettings) -> list[dict[str, Any]]:
    matrices = [weight for weight in weights if weight.ndim >= 2]
    others = [weight for weight in weights if weight.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
