"""The processes of a run, as torchrun starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from infllm_flex.training.settings import TrainingSettings


@dataclass(frozen=True)
class World:
    """The rank of this process and the processes of the run.

    Processes that split a sequence among them (a context group) have consecutive ranks.

    Attributes:
        device: Device of this process.
        rank: Rank of this process.
        size: Number of processes.
        context: Number of processes of a context group.
        mesh: All processes in one dimension, ``all``. None without torchrun.
        group: The context group of this process. None if it has one process.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    context: int = 1
    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints messages."""
        return self.rank == 0

    @property
    def context_rank(self) -> int:
        """Rank of this process in its context group."""
        return self.rank % self.context

    @property
    def data_size(self) -> int:
        """Number of context groups, each of which has its own sequences."""
        return self.size // self.context

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all processes, in place; every process gets the same bits."""
        if self.mesh is not None:
            dist.all_reduce(value)
        return value

    def max(self, value: int) -> int:
        """The maximum over all processes."""
        if self.mesh is None:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)


def is_first_process() -> bool:
    """Whether this process prints messages; works before `open_world`."""
    return int(os.environ.get("RANK", "0")) == 0


def check_processes(settings: TrainingSettings, size: int) -> None:
    """Refuse a number of processes that cannot split the batches and sequences evenly.

    Raises:
        ValueError: Names the setting to change.
    """
    context = settings.parallel.context
    if size % context:
        raise ValueError(
            f"parallel.context must divide the number of processes, {size}, got {context}"
        )
    for name, stage in settings.stages.items():
        if stage.batch_size % (size // context):
            raise ValueError(
                f"stages.{name}: batch_size must be a multiple of {size // context}, the number of "
                f"processes divided by parallel.context, got {stage.batch_size}"
            )
        if context > 1 and stage.max_length % (2 * context):
            raise ValueError(
                f"stages.{name}: max_length must be a multiple of twice parallel.context = "
                f"{2 * context}, got {stage.max_length}"
            )


def num_processes() -> int:
    """Number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def was_restarted() -> bool:
    """Whether torchrun restarted this process because a process of the run had failed."""
    return _attempt() > 0


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextlib.contextmanager
def open_world(settings: TrainingSettings) -> Iterator[World]:
    """Join the processes that torchrun started, for the block. Without torchrun: one process.

    Raises:
        ValueError: The device is not available, or the number of processes does not fit the
            settings.
    """
    device = pick_device(settings.run.device)
    size = num_processes()
    check_processes(settings, size)
    if not dist.is_torchelastic_launched():
        if size > 1:
            raise ValueError(
                f"{size} processes (WORLD_SIZE) must be started by torchrun, this one was not: "
                "use torchrun, with --nnodes on several machines, or unset WORLD_SIZE"
            )
        if settings.memory.cpu_offload:
            raise ValueError(
                "memory.cpu_offload needs torchrun, also for one process: "
                "torchrun --nproc-per-node 1 scripts/finetune.py ..."
            )
        yield World(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Messages between processes are CPU tensors, on machines with GPUs too.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _process_group(backend):
        context = settings.parallel.context
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("all",))
        parts = init_device_mesh(
            device.type, (size // context, context), mesh_dim_names=("data", "context")
        )
        group = parts.get_group("context") if context > 1 else None
        yield World(device, dist.get_rank(), size, context, mesh, group)


@contextlib.contextmanager
def _process_group(backend: str) -> Iterator[None]:
    """The process group of all processes; destroyed after the block unless it existed before."""
    if dist.is_initialized():
        yield
        return
    store, rank, size = next(rendezvous("env://"))
    # torchrun may restart processes on the same store. The prefix hides the keys of the previous
    # attempt, which hold addresses of processes that no longer exist.
    store = dist.PrefixStore(f"attempt-{_attempt()}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """The device of ``run.device``.

    Raises:
        ValueError: The device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: cuda is not available here; set run.device=cpu")
    return torch.device(name)
