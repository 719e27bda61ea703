"""FSDP2 or DDP around the loss of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from infllm_flex.training.parallel.weights import every_tensor, spread
from infllm_flex.training.parallel.world import World
from infllm_flex.training.settings import TrainingSettings


def wrap(loss: nn.Module, layers: list[nn.Module], settings: TrainingSettings, world: World) -> Any:
    """Spread a model over the processes, with the weights that it has in the first one.

    Args:
        loss: The module whose forward is the whole computation of a step.
        layers: Its parts that are gathered one after the other.
        settings: The whole run.
        world: The processes.

    Returns:
        The module to call; it computes in ``model.arithmetic``.
    """
    if world.mesh is None:
        return _autocast(loss.to(world.device), settings, world)
    source = every_tensor(loss)
    if settings.parallel.kind == "ddp":
        loss = _autocast(loss.to(world.device), settings, world)
        spread(loss, source, world)
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
    spread(loss, source, world)
    return loss


@contextlib.contextmanager
def gradients_later(module: nn.Module, later: bool) -> Iterator[None]:
    """Leave the exchange of gradients to a later micro-batch, where that spares time.

    FSDP's parts are exchanged at once: waiting would cost the memory that it is there to spare.
    """
    if later and isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield


def _autocast(loss: nn.Module, settings: TrainingSettings, world: World) -> nn.Module:
    """Let a module that is not cut into parts compute in another precision than its weights'."""
    if settings.model.arithmetic != "weights":
        dtype = getattr(torch, settings.model.arithmetic)
        loss.forward = torch.autocast(world.device.type, dtype)(loss.forward)
    return loss
