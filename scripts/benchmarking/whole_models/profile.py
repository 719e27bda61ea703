"""Where the device's time goes, by groups of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

from benchmarking.whole_models.clock import seconds_of
from benchmarking.whole_models.kernel_groups import GROUPS, group_of


class Span(NamedTuple):
    """A kernel that ran: its name, and start and end in microseconds."""

    name: str
    start: float
    end: float


def profile(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Profile one run.

    Args:
        run: The settings of the run.
        device: A GPU, whose kernels are counted, or a CPU, whose operators are.

    Returns:
        Milliseconds by group, in the order of ``GROUPS``, and of ``"gaps"``, in which nothing of
        these ran.
    """
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as recorded:
        seconds = seconds_of(run, device)
    events = recorded.events() or ()
    if on_gpu:
        return by_group(
            Span(event.name, event.time_range.start, event.time_range.end)
            for event in events
            if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
        )
    times = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        times[group_of(_outermost(event))] += event.self_cpu_time_total / 1e3
    return times | {"gaps": max(0.0, 1e3 * seconds - sum(times.values()))}


def _outermost(event: Any) -> str:
    """The operator of this package that an operator runs in; else its own name."""
    name = event.name
    while event is not None:
        if event.name.startswith("infllm_flex::"):
            name = event.name
        event = event.cpu_parent
    return name


def by_group(spans: Iterable[Span]) -> dict[str, float]:
    """Sum up milliseconds of kernels by group, and of the gaps between the first and the last."""
    times, gaps, busy_until = dict.fromkeys(GROUPS, 0.0), 0.0, None
    for span in sorted(spans, key=lambda span: span.start):
        times[group_of(span.name)] += (span.end - span.start) / 1e3
        if busy_until is not None:
            gaps += max(0.0, span.start - busy_until) / 1e3
        busy_until = span.end if busy_until is None else max(busy_until, span.end)
    return times | {"gaps": gaps}
