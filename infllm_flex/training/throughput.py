"""FLOPs utilisation, memory and sparsity between two lines of the log."""

from __future__ import annotations

import time
from typing import Any

import torch

from infllm_flex.process_memory import peak_resident_bytes
from infllm_flex.training.data import Batch
from infllm_flex.training.flops import FlopCounter, document_lengths, peak_flops
from infllm_flex.training.parallel import World
from infllm_flex.training.settings import StageSettings, TrainingSettings

_GIB = 2**30


class Meter:
    """Measures the steps of a stage; the batches of this process stand for all processes.

    Args:
        model: The trained model.
        stage: The stage.
        settings: The whole run.
        world: The processes.
    """

    def __init__(
        self, model: Any, stage: StageSettings, settings: TrainingSettings, world: World
    ) -> None:
        self._counter, self._world = FlopCounter(model, stage, settings.attention), world
        self._peak = peak_flops(world.device, settings.log.peak_tflops)
        self._restart()

    def _restart(self) -> None:
        self._sparse_fraction, self._flops = 0.0, 0.0
        self._started = time.perf_counter()

    def count(self, batch: Batch) -> None:
        """Add the batch of this process for one step."""
        rows, length = batch.input_ids.shape
        lengths = document_lengths(length, rows, batch.position_ids)
        self._sparse_fraction = self._counter.sparse_tokens(lengths) / (rows * length)
        self._flops += self._counter.flops(lengths)

    def values(self) -> dict[str, Any]:
        """The measurements since the last call.

        Returns:
            ``sparse_tokens``: fraction of the last step's tokens that attend sparsely.
            ``mfu``: model FLOPs utilisation of the devices, None if their peak is unknown.
            ``memory_gib``: peak memory.
        """
        seconds, world = time.perf_counter() - self._started, self._world
        mfu = None
        if self._peak is not None:
            flops_per_second = self._flops * world.data_size / max(seconds, 1e-9)
            mfu = round(flops_per_second / (self._peak * world.size), 4)
        values = {
            "sparse_tokens": self._sparse_fraction,
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
