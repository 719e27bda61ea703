"""Speed, memory and sparsity between two lines of the log."""

from __future__ import annotations

import time
from typing import Any

import torch

from infllm_flex.process_memory import peak_resident_bytes
from infllm_flex.training.data import Batch
from infllm_flex.training.flops import Work, document_lengths, peak_operations
from infllm_flex.training.parallel import World
from infllm_flex.training.settings import StageSettings, TrainingSettings

_GIB = 2**30


class Meter:
    """What the steps of a stage do, told for all processes by what one of them sees.

    Args:
        model: The model that is trained.
        stage: The stage.
        settings: The whole run.
        world: The processes.
    """

    def __init__(
        self, model: Any, stage: StageSettings, settings: TrainingSettings, world: World
    ) -> None:
        self._work, self._world = Work(model, stage, settings.attention), world
        self._peak = peak_operations(world.device, settings.log.peak_tflops)
        self._restart()

    def _restart(self) -> None:
        self._sparse, self._operations = 0.0, 0.0
        self._started = time.perf_counter()

    def count(self, batch: Batch) -> None:
        """Add a step's batch of this process."""
        rows, length = batch.input_ids.shape
        lengths = document_lengths(length, rows, batch.position_ids)
        self._sparse = self._work.sparse_tokens(lengths) / (rows * length)
        self._operations += self._work.operations(lengths)

    def values(self) -> dict[str, Any]:
        """What was measured since the last call.

        Returns:
            ``sparse_tokens``, the last step's share of tokens in documents that attend sparsely;
            ``mfu``, model FLOPs utilisation: the share of what the devices could do that went into
            what the model needs, None where their peak is not known; ``memory_gib``, the most that
            was in use.
        """
        seconds, world = time.perf_counter() - self._started, self._world
        mfu = None
        if self._peak is not None:
            done = self._operations * world.data_size / max(seconds, 1e-9)
            mfu = round(done / (self._peak * world.size), 4)
        values = {
            "sparse_tokens": self._sparse,
            "mfu": mfu,
            "memory_gib": round(_peak_memory(world.device) / _GIB, 3),
        }
        self._restart()
        return values


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return peak_resident_bytes()
