"""Time models by turns, within a limit of time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

import torch

from benchmarking.timing import Limits, Subject, Timing, time_in_rotation
from benchmarking.whole_models.runs import Timed


class OutOfTimeError(Exception):
    """The time of the run is over."""


class Deadline:
    """The end of a run.

    Args:
        seconds: Time from now on; 0: no limit.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds if seconds else float("inf")

    def check(self) -> None:
        """Do nothing before the end.

        Raises:
            OutOfTimeError: The end is over.
        """
        if time.monotonic() >= self._end:
            raise OutOfTimeError


def time_by_turns(
    timed: Sequence[Timed], device: torch.device, warmup: int, rounds: int, deadline: Deadline
) -> list[Timing]:
    """Time models by the wall clock, each once per round, in an order that rotates.

    The clock starts and ends at an idle device, as a user waits for the result.

    Args:
        timed: The models.
        device: Their device.
        warmup: Runs of each before timing.
        rounds: Rounds.
        deadline: Checked before every run.

    Returns:
        Milliseconds of one step of each model.

    Raises:
        OutOfTimeError: The deadline came first.
    """

    def clock(subject: Subject) -> dict[str, float]:
        deadline.check()
        if device.type == "cuda":
            gc.collect()  # caches of earlier runs; the rotation has switched the collector off
        return {"step": 1e3 * seconds_of(subject.forward, device) / steps[subject.variant]}

    steps = {one.attention: one.steps for one in timed}
    subjects = [Subject("model", one.attention, one.run) for one in timed]
    limits = Limits(warmup, rounds, rounds, 0)
    return [parts["step"] for parts in time_in_rotation(subjects, device, limits, clock)]


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Run an action on an idle device, wait for it, and return the seconds."""
    wait_for(device)
    start = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
