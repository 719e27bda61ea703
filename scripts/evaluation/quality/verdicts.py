"""Retained accuracy of each arm and task, and whether the task distinguishes it from controls."""

from __future__ import annotations

from typing import NamedTuple

import torch

from evaluation.quality.arms import DENSE, RANDOM, WINDOW, Arm
from evaluation.quality.nats import buckets
from evaluation.quality.results import Results, group_of
from evaluation.quality.statistics import Interval, excess, gap_closed, mean_retained, retained

ABLE = 0.5  # least accuracy of the dense model on a task that counts
PASSED = 0.9  # retained accuracy from which an arm passes a task
_DENSE = Arm(DENSE, DENSE)


class Retained(NamedTuple):
    """Retained accuracy on a task.

    Attributes:
        share: Accuracy over that of the dense model.
        remark: The reason why the number is no evidence; empty where it is.
    """

    share: Interval
    remark: str


def retained_accuracy(results: Results, arm: Arm, task: str) -> Retained | None:
    """Return the retained accuracy of an arm; None where it or the dense arm is not done."""
    share = _share(results, arm, task)
    if share is None:
        return None
    dense = results.accuracy(task, _DENSE)
    if not dense >= ABLE:
        return Retained(share, f"dense answers {dense:.2f}")
    if arm.run in (DENSE, WINDOW, RANDOM):
        return Retained(share, "")
    for control in controls(arm):
        theirs = _share(results, control, task)
        if theirs is None:
            return Retained(share, f"{control.run} is not judged yet")
        if theirs.high >= share.low:
            if share.value >= PASSED:
                return Retained(share, f"no evidence: {control.run} keeps {theirs.value:.2f}")
            return Retained(share, f"no better than {control.run}, {theirs.value:.2f}")
    if (seen := results.visible(controls(arm)[0])) < results.visible(arm):
        return Retained(
            share, f"the controls see fewer tokens, {seen}: compare by control={arm.run}"
        )
    return Retained(share, "")


def controls(arm: Arm) -> tuple[Arm, Arm]:
    """Return the controls of an arm: trained densely if it was, else trained with the control."""
    if arm.tuned == DENSE:
        return Arm(DENSE, WINDOW), Arm(DENSE, RANDOM)
    return Arm(WINDOW, WINDOW), Arm(RANDOM, RANDOM)


def closed_gap(results: Results, arm: Arm) -> Interval | None:
    """Return the fraction of the gap window to dense that an arm closes, in the second half.

    None where it is not measured, and where there is no gap: the window predicts the text no worse
    than dense attention, within the interval.
    """
    last = str(buckets(results.settings.length)[-1])
    window = controls(arm)[0]
    found = results.nats(last, arm, _DENSE, window)
    if found is None or arm in (_DENSE, window) or not has_gap(results, arm):
        return None
    return gap_closed(*found)


def has_gap(results: Results, arm: Arm) -> bool | None:
    """Return whether the window of an arm predicts the second half worse than dense attention.

    None where one of both is not measured.
    """
    last = str(buckets(results.settings.length)[-1])
    found = results.nats(last, _DENSE, controls(arm)[0])
    return None if found is None else excess(found[1], found[0]).low > 0


def mean_of_retrieval(results: Results, arm: Arm) -> float | None:
    """Return the mean retained accuracy over the retrieval tasks that the dense model can do."""
    shares = [
        found.share.value
        for task in results.settings.judge.tasks
        if results.accuracy(task, _DENSE) >= ABLE
        and (found := retained_accuracy(results, arm, task))
    ]
    return sum(shares) / len(shares) if shares else None


def mean_of_ruler(results: Results, arm: Arm) -> Interval | None:
    """Return the mean retained accuracy over the RULER tasks that the dense model can do."""
    pairs = [
        found
        for task in results.tasks()
        if group_of(task) == "ruler"
        and results.accuracy(task, _DENSE) >= ABLE
        and (found := results.hits(task, arm, _DENSE))
    ]
    if arm == _DENSE or not pairs:
        return None
    ours, dense = (torch.stack(several, -1) for several in zip(*pairs, strict=True))
    return mean_retained(ours, dense)


def _share(results: Results, arm: Arm, task: str) -> Interval | None:
    if arm == _DENSE:
        return None
    found = results.hits(task, arm, _DENSE)
    return None if found is None else retained(*found)
