"""Sharded tensors and their unsharded values; broadcast of the weights of the first process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from infllm_flex.training.parallel.world import World


def full(tensor: Tensor) -> Tensor:
    """The unsharded tensor. For a DTensor, all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_full(target: Tensor, full: Tensor) -> None:
    """Copy an unsharded tensor, or this process's shard of it, into ``target``."""
    if isinstance(target, DTensor):
        # Every process holds the whole tensor, so no communication is needed.
        full = distribute_tensor(
            full.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(full)


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, non-persistent buffers included; tied tensors once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def broadcast_model(model: nn.Module, source: dict[str, Tensor], world: World) -> None:
    """Broadcast the parameters and buffers of the first process to all processes.

    One tensor is sent at a time, which limits the additional memory to one unsharded tensor.
    ``set_model_state_dict(broadcast_from_rank0=True)`` is not used: it skips non-persistent
    buffers, and it pickles.

    Args:
        model: The model, wrapped or not.
        source: `all_tensors` of the model before it was wrapped. Only that of the first process
            is read.
        world: The processes.
    """
    for name, target in all_tensors(model).items():
        if world.is_first:
            full = source[name].detach().to(world.device)
        else:
            full = torch.empty(target.shape, dtype=target.dtype, device=world.device)
        dist.broadcast(full, src=0)
        copy_full(target.detach(), full)
