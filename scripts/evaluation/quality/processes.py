"""The same command in several processes, which share a folder, spread over the GPUs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

import torch

_PIPE = "INFLLM_FLEX_QUALITY_PIPE"  # descriptor whose end says that the parent has ended


def run_in_processes(command: Sequence[str], count: int, uses_gpus: bool) -> int:
    """Run a command in several processes at once; only their stderr is shown.

    A terminal's Ctrl-C reaches this process alone, and an exception here, such as a signal raises,
    sends each process one SIGTERM. A second exception sends a second one, which ends them without
    saving. If this process is killed, `stop_with_parent` stops them.

    Args:
        command: Arguments of this Python.
        count: Number of processes; of 2 GPUs, the first gets processes 0, 2 and so on.
        uses_gpus: Whether each process sees a single GPU.

    Returns:
        The first exit status that is not 0, or 0.
    """
    gpus = _visible_gpus() if uses_gpus else []
    processes: list[subprocess.Popen[bytes]] = []
    ours, theirs = os.pipe()  # nothing is written: `theirs` closes when this process ends
    try:
        for number in range(count):
            # Bars of several processes would overwrite each other; lines say what begins and ends.
            environment = os.environ | {"TQDM_DISABLE": "1", _PIPE: str(ours)}
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # else the terminal signals them, too
                    pass_fds=(ours,),
                )
            )
        statuses = [process.wait() for process in processes]
    finally:
        try:
            _terminate(processes)
        except BaseException:
            _terminate(processes)
            raise
        finally:
            os.close(ours)
            os.close(theirs)
    return next((status for status in statuses if status), 0)


def stop_with_parent() -> None:
    """In a process that `run_in_processes` started: raise SIGTERM here when that one ends."""
    descriptor = os.environ.pop(_PIPE, None)
    if descriptor is None:
        return

    def watch(pipe: int) -> None:
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, args=(int(descriptor),), daemon=True).start()


def _terminate(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    for process in processes:
        process.wait()


def _visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES chooses each GPU that this process sees."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]
