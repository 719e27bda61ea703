"""The same command in several processes, which share a folder, spread over the GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch


def run_in_processes(command: Sequence[str], count: int, uses_gpus: bool) -> int:
    """Run a command in several processes at once; only their stderr is shown.

    Args:
        command: Arguments of this Python.
        count: Number of processes; of 2 GPUs, the first gets processes 0, 2 and so on.
        uses_gpus: Whether each process sees a single GPU.

    Returns:
        The first exit status that is not 0, or 0.
    """
    gpus = _visible_gpus() if uses_gpus else []
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            # Bars of several processes would overwrite each other; lines say what begins and ends.
            environment = os.environ | {"TQDM_DISABLE": "1"}
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command], env=environment, stdout=subprocess.DEVNULL
                )
            )
        statuses = [process.wait() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # as a signal to it would: it saves finished parts
        for process in processes:
            process.wait()
    return next((status for status in statuses if status), 0)


def _visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES chooses each GPU that this process sees."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]
