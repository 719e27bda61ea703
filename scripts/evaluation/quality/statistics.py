"""What is kept, with its interval: a paired bootstrap over seeds and sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_REPLICATES = 4000
_TAIL = 0.025


class Interval(NamedTuple):
    """A number and the 95 % interval around it; nan where it cannot be told."""

    value: float
    low: float
    high: float


def retained(ours: Tensor, dense: Tensor) -> Interval:
    """The share of the dense model's right answers that a sparse one gives.

    Args:
        ours: Right answers, ``[seeds, sequences]``.
        dense: The same of the dense model, of the same sequences.
    """
    return bootstrap(torch.stack([ours, dense], -1), lambda m: m[..., 0] / m[..., 1], nested=True)


def gap_closed(ours: Tensor, dense: Tensor, window: Tensor) -> Interval:
    """The share of what a window costs that a sparse model does not.

    Args:
        ours: Nats, ``[seeds, sequences]``, of the same sequences with every seed.
        dense: Alike.
        window: Alike.
    """
    columns = torch.stack([ours, dense, window], -1)
    return bootstrap(
        columns, lambda m: (m[..., 2] - m[..., 0]) / (m[..., 2] - m[..., 1]), nested=False
    )


def bootstrap(
    values: Tensor, statistic: Callable[[Tensor], Tensor], *, nested: bool, seed: int = 0
) -> Interval:
    """A statistic of means, and its 95 % interval by the percentiles of resampled means.

    Seeds are drawn with replacement, and for each draw sequences. What is measured of one sequence
    stays together. One seed alone says nothing of other seeds: then only sequences are drawn.

    Args:
        values: ``[seeds, sequences, columns]``.
        statistic: Of the means of the columns: ``[..., columns]`` to ``[...]``.
        nested: Whether each seed has sequences of its own; else all have the same, and a draw of
            sequences holds for all seeds.
        seed: Of the draws.
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
