"""What a variant keeps of each task, and whether the task tells anything."""

from __future__ import annotations

from typing import NamedTuple

from evaluation.quality.arms import DENSE, RANDOM, WINDOW, Arm
from evaluation.quality.nats import buckets
from evaluation.quality.results import Results
from evaluation.quality.statistics import Interval, gap_closed, retained

ABLE = 0.5  # of the questions must the dense model answer
PASSED = 0.9  # of them kept is a pass
_DENSE = Arm(DENSE, DENSE)


class Kept(NamedTuple):
    """What is kept of a task.

    Attributes:
        share: Of the dense model's right answers.
        remark: Why the share does not say what it seems to; empty where it does.
    """

    share: Interval
    remark: str


def kept(results: Results, arm: Arm, task: str) -> Kept | None:
    """What an arm keeps of a task; None where it is not done, or there is nothing to compare."""
    share = _share(results, arm, task)
    if share is None:
        return None
    dense = results.accuracy(task, _DENSE)
    if not dense >= ABLE:
        return Kept(share, f"dense answers {dense:.2f}")
    if arm.run in (DENSE, WINDOW, RANDOM):
        return Kept(share, "")
    for control in controls(arm):
        theirs = _share(results, control, task)
        if theirs is None:
            return Kept(share, f"{control.run} is not judged")
        if theirs.high >= share.low:
            if share.value >= PASSED:
                return Kept(share, f"says nothing: {control.run} keeps {theirs.value:.2f}")
            return Kept(share, f"no better than {control.run}, {theirs.value:.2f}")
    return Kept(share, "")


def controls(arm: Arm) -> tuple[Arm, Arm]:
    """The arms without a choice that an arm is compared with: trained as it was, or not."""
    if arm.tuned == DENSE:
        return Arm(DENSE, WINDOW), Arm(DENSE, RANDOM)
    return Arm(WINDOW, WINDOW), Arm(RANDOM, RANDOM)


def closed(results: Results, arm: Arm) -> Interval | None:
    """The share of the gap from the window to dense that an arm closes, in the last half."""
    last = str(buckets(results.settings.length)[-1])
    window = controls(arm)[0]
    found = results.nats(last, arm, _DENSE, window)
    return None if found is None or arm in (_DENSE, window) else gap_closed(*found)


def mean_kept(results: Results, arm: Arm) -> float | None:
    """The mean over the retrieval tasks that the dense model is able to do."""
    shares = [
        found.share.value
        for task in results.settings.judge.tasks
        if results.accuracy(task, _DENSE) >= ABLE and (found := kept(results, arm, task))
    ]
    return sum(shares) / len(shares) if shares else None


def _share(results: Results, arm: Arm, task: str) -> Interval | None:
    if arm == _DENSE:
        return None
    found = results.hits(task, arm, _DENSE)
    return None if found is None else retained(*found)
