"""Confidence intervals by a paired bootstrap over seeds and sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_REPLICATES = 4000
_TAIL = 0.025


class Interval(NamedTuple):
    """A number and its 95 % interval; nan where it is undefined."""

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
    columns = torch.stack([ours, dense], -1).flatten(-2)
    return bootstrap(columns, lambda m: (m[..., 0::2] / m[..., 1::2]).mean(-1), nested=True)


def gap_closed(ours: Tensor, dense: Tensor, window: Tensor) -> Interval:
    """Return the fraction of the gap in nats between window and dense that a sparse model closes.

    Args:
        ours: Nats ``[seeds, sequences]``; the sequences are the same with every seed.
        dense: Nats of the dense model, ``[seeds, sequences]``.
        window: Nats of the window, ``[seeds, sequences]``.
    """
    columns = torch.stack([ours, dense, window], -1)
    return bootstrap(
        columns, lambda m: (m[..., 2] - m[..., 0]) / (m[..., 2] - m[..., 1]), nested=False
    )


def bootstrap(
    values: Tensor, statistic: Callable[[Tensor], Tensor], *, nested: bool, seed: int = 0
) -> Interval:
    """Return a statistic of means, and its 95 % interval by the percentiles of resampled means.

    Seeds are drawn with replacement, and sequences for each of them. The columns of a sequence stay
    together. With a single seed, only sequences are drawn, and the interval leaves out the variance
    between seeds.

    Args:
        values: ``[seeds, sequences, columns]``.
        statistic: Function of the means of the columns, ``[..., columns]`` to ``[...]``.
        nested: Whether each seed has sequences of its own; if not, all seeds have the same, and one
            draw of sequences is used for all seeds.
        seed: Seed of the draws.
    """
    values = values.double()
    seeds, sequences = values.shape[:2]
    random = torch.Generator().manual_seed(seed)

    def draw(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=random)

    which = draw(seeds, _REPLICATES, seeds)
    rows = draw(sequences, _REPLICATES, seeds if nested else 1, sequences)
    means = torch.zeros(_REPLICATES, values.shape[2], dtype=torch.float64)
    for number in range(seeds):
        drawn = values[which[:, number, None], rows[:, number if nested else 0]]
        means += drawn.mean(1) / seeds
    found = statistic(means)
    found = found[found.isfinite()]
    value = float(statistic(values.mean((0, 1))))
    if len(found) < _REPLICATES // 2 or value != value:
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = torch.quantile(found, torch.tensor([_TAIL, 1 - _TAIL], dtype=torch.float64))
    return Interval(value, float(low), float(high))
