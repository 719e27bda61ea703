"""Confidence intervals over seeds and sequences, of statistics of means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_NORMAL = 1.959964  # 97.5 % of a normal distribution lie below
_STUDENT = {1: 12.7062, 2: 4.3027}  # of Student's, by degrees of freedom; more: `_student`
_UNSEEN = 2.0  # answers that are added to every count: one that is lost and one that is won


class Interval(NamedTuple):
    """A number and its 95 % interval.

    All three are nan where the number is undefined. The interval is infinite where nothing says how
    far the number would vary: a single sequence of a single seed.
    """

    value: float
    low: float
    high: float


def retained(ours: Tensor, dense: Tensor) -> Interval:
    """Return the accuracy of a sparse model over that of the dense one.

    Args:
        ours: Correct answers ``[seeds, sequences]``.
        dense: Correct answers of the dense model ``[seeds, sequences]``, on the same sequences.
    """
    return mean_retained(ours[..., None], dense[..., None])


def mean_retained(ours: Tensor, dense: Tensor) -> Interval:
    """Return the mean over tasks of the accuracy of a sparse model over that of the dense one.

    Args:
        ours: Correct answers ``[seeds, sequences, tasks]``.
        dense: Correct answers of the dense model, ``[seeds, sequences, tasks]``.
    """

    def share(means: Tensor) -> Tensor:
        mine, theirs = means.chunk(2)
        return (mine / theirs).mean()

    counts = dense.sum((0, 1))
    return interval(torch.cat([ours, dense], -1), share, nested=True, counts=counts)


def gap_closed(ours: Tensor, dense: Tensor, window: Tensor) -> Interval:
    """Return the fraction of the gap in nats between window and dense that a sparse model closes.

    Args:
        ours: Nats ``[seeds, sequences]``; the sequences are the same with every seed.
        dense: Nats of the dense model, ``[seeds, sequences]``.
        window: Nats of the window, ``[seeds, sequences]``.
    """
    columns = torch.stack([ours, dense, window], -1)
    return interval(columns, lambda m: (m[2] - m[0]) / (m[2] - m[1]), nested=False)


def excess(ours: Tensor, dense: Tensor) -> Interval:
    """Return by how many nats per token the loss of a model exceeds that of the dense one.

    Args:
        ours: Nats ``[seeds, sequences]``; the sequences are the same with every seed.
        dense: Nats of the dense model, ``[seeds, sequences]``.
    """
    return interval((ours - dense)[..., None], lambda m: m[0], nested=False)


def interval(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor],
    *,
    nested: bool,
    counts: Tensor | None = None,
) -> Interval:
    """Return a statistic of means, and its 95 % interval for further seeds and sequences.

    The statistic is taken as linear in the means. The interval is Student's, over seeds and over
    sequences: three seeds say little about the next one. With a single seed, it leaves out the
    variance between seeds.

    Args:
        values: ``[seeds, sequences, columns]``. The columns of a sequence stay together.
        statistic: Differentiable function of the means of the columns, ``[columns]`` to ``[]``.
        nested: Whether each seed has sequences of its own; if not, all seeds have the same.
        counts: Answers ``[tasks]``, if the statistic is a mean over tasks of shares of them. Each
            count is taken to hide one answer lost and one won, so that equal answers have an
            interval, too, and the interval ends at 0.

    Source: Bonett and Price, Journal of Educational and Behavioral Statistics 37 (2012), for the
        added answers.
    """
    values = values.double()
    means = values.mean((0, 1)).requires_grad_()
    result = statistic(means)
    value = float(result.detach())
    if not math.isfinite(value):
        return Interval(math.nan, math.nan, math.nan)
    (slope,) = torch.autograd.grad(result, means)
    half = _half_width((values - means.detach()) @ slope, nested)
    if counts is None:
        return Interval(value, value - half, value + half)
    unseen = float((_UNSEEN / counts.double().square()).sum().sqrt()) / len(counts)
    half = math.hypot(half, _NORMAL * unseen)
    return Interval(value, max(0.0, value - half), value + half)


def _half_width(errors: Tensor, nested: bool) -> float:
    """Return half the width of the interval of the mean of ``errors`` ``[seeds, sequences]``."""
    seeds, sequences = errors.shape
    over_seeds = _of_mean(errors.mean(1), seeds - 1)
    if not nested:  # further seeds have the same sequences, further sequences the same seeds
        return math.hypot(_of_mean(errors.mean(0), sequences - 1), over_seeds if seeds > 1 else 0.0)
    if sequences == 1:
        return over_seeds
    apart = (errors - errors.mean(1, keepdim=True)).flatten()
    over_sequences = _of_mean(apart, seeds * (sequences - 1))
    # The means of seeds vary with their sequences, too: they already contain that part.
    return max(over_sequences, over_seeds) if seeds > 1 else over_sequences


def _of_mean(errors: Tensor, degrees: int) -> float:
    """Return half the width of the interval of a mean of independent ``errors`` ``[N]``."""
    if not degrees:
        return math.inf
    squares = float((errors - errors.mean()).square().sum())
    return _student(degrees) * math.sqrt(squares / degrees / len(errors))


def _student(degrees: int) -> float:
    """Return the number below which 97.5 % of Student's distribution lie, within 0.2 %."""
    if degrees in _STUDENT:
        return _STUDENT[degrees]
    z, n = _NORMAL, degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )
