"""Tensors of which every process holds a part, and the whole ones they stand for."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from infllm_flex.training.parallel.world import World


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Where it is in parts, every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, full: Tensor) -> None:
    """Copy a whole tensor, or this process's part of it, into ``target``."""
    if isinstance(target, DTensor):
        # Every process has all of it: there is nothing to send.
        full = distribute_tensor(
            full.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(full)


def every_tensor(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, also those that are not saved; tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def spread(model: nn.Module, source: dict[str, Tensor], world: World) -> None:
    """Give the model of every process the values that the first one has.

    One tensor at a time, so that no more than that is ever held in addition.

    Args:
        model: Wrapped or not.
        source: `every_tensor` of the model from before it was wrapped; the first process's counts.
        world: The processes.
    """
    for name, target in every_tensor(model).items():
        if world.is_first:
            full = source[name].detach().to(world.device)
        else:
            full = torch.empty(target.shape, dtype=target.dtype, device=world.device)
        dist.broadcast(full, src=0)
        fill(target.detach(), full)
