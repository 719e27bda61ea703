"""Parallelism of a run, and how it saves memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infllm_flex.strict_yaml import check_range


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """The split of the work among the processes that torchrun starts.

    The result does not depend on the number of processes, up to rounding: ``batch_size`` counts the
    sequences of all processes.

    Attributes:
        kind: ``fsdp`` shards weights, gradients and optimizer state over the processes. ``ddp``
            replicates them.
        context: Number of processes that split each sequence among them. Each computes the queries
            of its part, over the gathered keys and values. Must divide the number of processes.
    """

    kind: Literal["fsdp", "ddp"] = "fsdp"
    context: int = 1

    def __post_init__(self) -> None:
        check_range("context", self.context, 1, 4096)


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """Ways to save memory; none of them changes the result.

    Attributes:
        activation_checkpointing: Keep only the input of each layer for the backward pass and
            recompute the rest.
        cpu_offload: Keep weights, gradients and optimizer state in CPU memory, and update the
            weights there. Needs ``parallel.kind: fsdp`` and torchrun.
        logits_mib: Size of a chunk of logits, in MiB of float32. Training needs several times as
            much; smaller chunks are slower.
    """

    activation_checkpointing: bool = False
    cpu_offload: bool = False
    logits_mib: int = 64

    def __post_init__(self) -> None:
        check_range("logits_mib", self.logits_mib, 1, 65536)
