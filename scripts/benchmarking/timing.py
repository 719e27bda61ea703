"""Time several things by turns, so that what slows the machine down slows all of them."""

from __future__ import annotations

import gc
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

_HEAD_START = 6_000_000  # clock cycles, about 3 ms, for the host to launch before the device begins


@dataclass(frozen=True)
class Subject:
    """Something to time.

    Attributes:
        op: What is done.
        variant: How.
        forward: Does it.
        backward: Takes what ``forward`` returned; None where there is none.
        settings: Name of the attention settings among the run's ``variants``; empty: those of
            ``attention``, or none at all.
    """

    op: str
    variant: str
    forward: Callable[[], Any]
    backward: Callable[[Any], object] | None = None
    settings: str = ""


class Timing(NamedTuple):
    """Milliseconds: the median, and what a fifth of the runs falls below and above."""

    p20: float
    p50: float
    p80: float


class Limits(NamedTuple):
    """How often to run: ``rounds``, then up to ``max_rounds`` while ``seconds`` last."""

    warmup: int
    rounds: int
    max_rounds: int
    seconds: float


def time_by_turns(
    subjects: Sequence[Subject], device: torch.device, limits: Limits
) -> list[dict[str, Timing]]:
    """Run every subject once per round, in an order that rotates.

    Args:
        subjects: What to compare.
        device: Whose clock to use.
        limits: How often.

    Returns:
        Per subject the timings ``"forward"``, or ``"forward"``, ``"backward"`` and
        ``"forward+backward"`` where it has a backward.
    """
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
                    samples[index][part].append(milliseconds)
            done += 1
    finally:
        gc.enable()
    return [{part: summarize(values) for part, values in taken.items()} for taken in samples]


def summarize(milliseconds: Sequence[float]) -> Timing:
    """Percentiles of samples."""
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
    """Take the device's time, as within a model whose earlier layers keep the device busy."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda.synchronize()
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


def _parts(durations: list[float]) -> dict[str, float]:
    if len(durations) == 1:
        return {"forward": durations[0]}
    forward, backward = durations
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}
