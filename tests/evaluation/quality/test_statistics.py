"""Intervals against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from evaluation.quality.statistics import bootstrap, gap_closed, mean_retained, retained


def test_a_mean_has_the_interval_of_the_normal_distribution():
    random = torch.Generator().manual_seed(0)
    values = torch.randn(1, 400, 1, generator=random, dtype=torch.float64) * 3 + 5
    found = bootstrap(values, lambda m: m[..., 0], nested=True)
    error = 1.96 * float(values.std()) / math.sqrt(400)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.low == pytest.approx(found.value - error, abs=0.08 * error)
    assert found.high == pytest.approx(found.value + error, abs=0.08 * error)


@pytest.mark.parametrize("nested", [True, False])
def test_seeds_that_differ_widen_the_interval(nested):
    # Seeds differ much more than sequences, hence the interval is that of the mean over seeds.
    seeds = torch.linspace(-1, 1, 40, dtype=torch.float64)
    values = seeds[:, None, None].repeat(1, 30, 1)
    found = bootstrap(values, lambda m: m[..., 0], nested=nested)
    error = 1.96 * float(seeds.std(correction=0)) / math.sqrt(40)
    assert found.high - found.low == pytest.approx(2 * error, rel=0.08)


def test_what_is_paired_is_drawn_together():
    dense = torch.randint(2, 13, (3, 40), generator=torch.Generator().manual_seed(1))
    half = retained(dense.float() / 2, dense.float())
    assert half.value == half.low == half.high == 0.5  # whichever rows are drawn
    one = torch.full((3, 40), 6.0)
    apart = retained(one, dense.float())
    assert apart.low < apart.value < apart.high


def test_the_interval_of_a_share_is_that_of_the_delta_method():
    random = torch.Generator().manual_seed(2)
    dense = (torch.rand(1, 600, generator=random) < 0.9).float()
    ours = dense * (torch.rand(1, 600, generator=random) < 0.7)
    found = retained(ours, dense)
    ratio = float(ours.mean() / dense.mean())
    spread = float((ours - ratio * dense).std()) / float(dense.mean()) / math.sqrt(600)
    assert found.value == pytest.approx(ratio)
    assert found.low == pytest.approx(ratio - 1.96 * spread, abs=0.15 * spread)
    assert found.high == pytest.approx(ratio + 1.96 * spread, abs=0.15 * spread)


def test_a_mean_over_unrelated_tasks_has_a_narrower_interval():
    random = torch.Generator().manual_seed(4)
    dense = (torch.rand(1, 400, 16, generator=random) < 0.9).float()
    ours = dense * (torch.rand(1, 400, 16, generator=random) < 0.8)
    found = mean_retained(ours, dense)
    alone = [retained(ours[..., task], dense[..., task]) for task in range(16)]
    assert found.value == pytest.approx(sum(one.value for one in alone) / 16)
    widths = sum((one.high - one.low) ** 2 for one in alone) ** 0.5 / 16
    assert found.high - found.low == pytest.approx(widths, rel=0.15)


def test_the_gap_closed_is_one_at_dense_and_zero_at_the_window():
    dense = torch.rand(2, 20, generator=torch.Generator().manual_seed(3)) + 1
    window = dense + 0.3
    assert gap_closed(dense, dense, window).value == pytest.approx(1.0)
    assert gap_closed(window, dense, window) == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)
    assert gap_closed(dense + 0.06, dense, window) == pytest.approx((0.8, 0.8, 0.8), abs=1e-5)


def test_what_cannot_be_told_is_nan():
    nothing = torch.zeros(3, 10)
    assert all(math.isnan(number) for number in retained(nothing, nothing))
    same = torch.ones(3, 10)
    assert all(math.isnan(number) for number in gap_closed(same, same, same))
