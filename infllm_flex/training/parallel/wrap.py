"""Wrap the loss of a model in FSDP2 or DDP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from infllm_flex.training.parallel.weights import all_tensors, broadcast_model
from infllm_flex.training.parallel.world import World
from infllm_flex.training.settings import TrainingSettings


def wrap(loss: nn.Module, layers: list[nn.Module], settings: TrainingSettings, world: World) -> Any:
    """Wrap the loss for the processes of the run and broadcast the weights of the first process.

    Args:
        loss: The module whose forward is the whole computation of a step.
        layers: Its decoder layers, which FSDP gathers one at a time.
        settings: Settings of the run.
        world: The processes.

    Returns:
        The module to call; it computes in ``model.arithmetic``.
    """
    if world.mesh is None:
        return _autocast(loss.to(world.device), settings, world)
    source = all_tensors(loss)
    if settings.parallel.kind == "ddp":
        loss = _autocast(loss.to(world.device), settings, world)
        broadcast_model(loss, source, world)
        return DistributedDataParallel(loss, init_sync=False)
    options: dict[str, Any] = {"mesh": world.mesh}
    if settings.model.arithmetic != "weights":
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=getattr(torch, settings.model.arithmetic), reduce_dtype=torch.float32
        )
    if settings.memory.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(loss, **options)
    broadcast_model(loss, source, world)
    return loss


@contextlib.contextmanager
def defer_gradient_sync(module: nn.Module, defer: bool) -> Iterator[None]:
    """Skip the gradient all-reduce of DDP inside the block, if ``defer`` is set.

    FSDP always reduces at once: deferring would keep unsharded gradients in memory.
    """
    if defer and isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield


def _autocast(loss: nn.Module, settings: TrainingSettings, world: World) -> nn.Module:
    """Run an unsharded module under autocast, if ``model.arithmetic`` asks for it."""
    if settings.model.arithmetic != "weights":
        dtype = getattr(torch, settings.model.arithmetic)
        loss.forward = torch.autocast(world.device.type, dtype)(loss.forward)
    return loss
