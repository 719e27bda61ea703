"""How a run is spread over processes, and what it spares memory with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infllm_flex.training.settings.bounds import check_range


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """How the processes that torchrun starts share the work; one plain process has it all.

    The training is the same on any number of processes, within rounding: ``batch_size`` counts the
    sequences of all of them together.

    Attributes:
        kind: ``fsdp`` cuts weights, gradients and optimizer state into one part per process;
            ``ddp`` keeps a copy of everything in each.
        context: Processes that share one sequence. Each holds the queries of its part; keys and
            values are gathered. Divides the number of processes.
    """

    kind: Literal["fsdp", "ddp"] = "fsdp"
    context: int = 1

    def __post_init__(self) -> None:
        check_range(self, "context", 1, 4096)


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What is computed twice, or kept elsewhere, to spare memory; none of it changes the result.

    Attributes:
        activation_checkpointing: Keep only the input of each layer for the backward pass and
            compute the rest again.
        cpu_offload: Keep weights, gradients and optimizer state in the memory of the CPU, and
            update the weights there. With ``parallel.kind: fsdp``, under torchrun.
        logits_mib: Logits of a sequence that are in memory at once, in MiB of float32. Several
            times as much is needed to train; less takes longer.
    """

    activation_checkpointing: bool = False
    cpu_offload: bool = False
    logits_mib: int = 64

    def __post_init__(self) -> None:
        check_range(self, "logits_mib", 1, 65536)
