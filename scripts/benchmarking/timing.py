"""Time several subjects in rotation, so that a slow phase of the machine affects all of them."""

from __future__ import annotations

import functools
import gc
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

_HEAD_START = 6_000_000  # clock cycles for which the device waits while the host launches


@dataclass(frozen=True)
class Subject:
    """A timed operation.

    Attributes:
        op: Name of the operation.
        variant: Engine or baseline.
        forward: Runs it.
        backward: Runs its backward, given the output of ``forward``; None: there is none.
        settings: Name of its attention settings among the run's ``variants``; empty: those of
            ``attention``, or an operation without attention settings.
        repeats: How often ``forward`` does the operation; times are those of one.
    """

    op: str
    variant: str
    forward: Callable[[], Any]
    backward: Callable[[Any], object] | None = None
    settings: str = ""
    repeats: int = 1


class Timing(NamedTuple):
    """Milliseconds: the 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


class Limits(NamedTuple):
    """Numbers of runs.

    Attributes:
        warmup: Runs of each subject that are not timed.
        rounds: Smallest number of rounds.
        max_rounds: Largest number of rounds.
        seconds: Time after which no round begins beyond ``rounds``.
    """

    warmup: int
    rounds: int
    max_rounds: int
    seconds: float


Clock = Callable[[Subject], dict[str, float]]


def time_in_rotation(
    subjects: Sequence[Subject], device: torch.device, limits: Limits, clock: Clock | None = None
) -> list[dict[str, Timing]]:
    """Run every subject once per round, in an order that rotates.

    Args:
        subjects: The subjects to compare.
        device: The device whose clock is used.
        limits: Numbers of runs.
        clock: Runs a subject once and returns milliseconds by part; None: the device's own.

    Returns:
        For each subject the timing ``"forward"``, and ``"backward"`` and ``"forward+backward"``
        where it has a backward; or the parts that ``clock`` returns.
    """
    if clock is None:
        clock = _cuda_clock if device.type == "cuda" else _cpu_clock
    for subject in subjects:
        for _ in range(limits.warmup):
            clock(subject)
    samples: list[dict[str, list[float]]] = [defaultdict(list) for _ in subjects]
    started, done = time.perf_counter(), 0
    gc.collect()
    gc.disable()
    try:
        while done < limits.rounds or (
            done < limits.max_rounds and time.perf_counter() - started < limits.seconds
        ):
            for turn in range(len(subjects)):
                index = (done + turn) % len(subjects)
                for part, milliseconds in clock(subjects[index]).items():
                    samples[index][part].append(milliseconds / subjects[index].repeats)
            done += 1
    finally:
        gc.enable()
    return [{part: summarize(values) for part, values in parts.items()} for parts in samples]


def in_turn(runs: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """Return a function that runs all of them and returns what the last one returns."""
    if len(runs) == 1:
        return runs[0]

    def run() -> Any:
        return [one() for one in runs][-1]

    return run


def summarize(milliseconds: Sequence[float]) -> Timing:
    """Return the percentiles of samples."""
    values = torch.tensor(milliseconds, dtype=torch.float64)
    return Timing(*values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())


def _cpu_clock(subject: Subject) -> dict[str, float]:
    stamps = [time.perf_counter()]
    out = subject.forward()
    stamps.append(time.perf_counter())
    if subject.backward is not None:
        subject.backward(out)
        stamps.append(time.perf_counter())
    return _parts([1e3 * (b - a) for a, b in itertools.pairwise(stamps)])


def _cuda_clock(subject: Subject) -> dict[str, float]:
    """Time on the device, as if earlier layers of a model had kept it busy and used its cache."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda.synchronize()
    _other_data(torch.cuda.current_device()).zero_()
    torch.cuda._sleep(_HEAD_START)
    events[0].record()
    out = subject.forward()
    events[1].record()
    if subject.backward is None:
        events.pop()
    else:
        subject.backward(out)
        events[2].record()
    torch.cuda.synchronize()
    return _parts([a.elapsed_time(b) for a, b in itertools.pairwise(events)])


@functools.cache
def _other_data(device: int) -> torch.Tensor:
    """Return a buffer that fills the L2 cache twice.

    Whatever ran before a subject leaves a part of its data there, which for a decode step is as
    much as the subject reads: whichever came after a relative of its own was faster.
    """
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * size, dtype=torch.uint8, device=torch.device("cuda", device))


def _parts(durations: list[float]) -> dict[str, float]:
    if len(durations) == 1:
        return {"forward": durations[0]}
    forward, backward = durations
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}
