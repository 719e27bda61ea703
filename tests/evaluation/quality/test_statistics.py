"""Intervals against closed forms, and how often they hold what they are about."""

from __future__ import annotations

import math

import pytest
import torch

from evaluation.quality.statistics import excess, gap_closed, interval, mean_retained, retained


def test_a_mean_has_the_interval_of_the_normal_distribution():
    random = torch.Generator().manual_seed(0)
    values = torch.randn(1, 400, 1, generator=random, dtype=torch.float64) * 3 + 5
    found = interval(values, lambda m: m[0], nested=True)
    error = 1.966 * float(values.std()) / math.sqrt(400)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.low == pytest.approx(found.value - error, abs=1e-3 * error)
    assert found.high == pytest.approx(found.value + error, abs=1e-3 * error)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("seeds", "student"), [(2, 12.706), (3, 4.303), (4, 3.182), (40, 2.023)])
def test_seeds_that_differ_have_students_interval(nested, seeds, student):
    values = torch.linspace(-1, 1, seeds, dtype=torch.float64)[:, None, None].repeat(1, 30, 1)
    found = interval(values, lambda m: m[0], nested=nested)
    error = student * float(values[:, 0].std()) / math.sqrt(seeds)
    assert (found.low, found.high) == pytest.approx((-error, error), rel=2e-3)


@pytest.mark.parametrize("between", [0.0, 0.05, 0.15])
def test_the_intervals_of_three_seeds_hold_the_share_that_many_seeds_would_have(between):
    random = torch.Generator().manual_seed(1)
    inside = 0
    for _ in range(200):
        keeps = 0.6 + between * torch.randn(3, 1, 1, generator=random)
        dense = torch.rand(3, 20, 12, generator=random) < 0.98
        ours = dense & (torch.rand(3, 20, 12, generator=random) < keeps)
        found = retained(ours.sum(-1), dense.sum(-1))
        inside += found.low <= 0.6 <= found.high
    assert inside / 200 >= 0.92


def test_the_intervals_of_three_seeds_hold_the_gap_that_many_windows_would_close():
    random = torch.Generator().manual_seed(2)
    inside = 0
    for _ in range(200):
        dense = torch.randn(1, 4, generator=random).expand(3, 4)
        share = 0.9 + 0.1 * torch.randn(1, 4, generator=random)
        found = gap_closed(dense + 0.2 * (1 - share), dense, dense + 0.2)
        inside += found.low <= 0.9 <= found.high
    assert inside / 200 >= 0.92


def test_columns_of_a_sequence_stay_together():
    dense = torch.randint(2, 13, (3, 40), generator=torch.Generator().manual_seed(1))
    half = retained(dense / 2, dense)
    answers = int(dense.sum())
    assert half.value == 0.5
    assert half.high - half.value == pytest.approx(1.96 * math.sqrt(2) / answers, rel=1e-3)
    apart = retained(torch.full((3, 40), 6.0), dense)
    assert apart.high - apart.low > 10 * (half.high - half.low)


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize("sequences", [1, 3, 100])
def test_equal_answers_have_an_interval_that_narrows_with_their_number(share, sequences):
    dense = torch.full((1, sequences), 12)
    found = retained(share * dense, dense)
    assert found.value == share
    if sequences == 1:
        assert (found.low, found.high) == (0.0, math.inf)  # nothing says how sequences vary
    else:
        assert found.high == pytest.approx(share + 1.96 * math.sqrt(2) / (12 * sequences), rel=1e-3)
        assert found.low == pytest.approx(max(0.0, 2 * share - found.high))


def test_the_interval_of_a_share_is_that_of_the_delta_method():
    random = torch.Generator().manual_seed(2)
    dense = (torch.rand(1, 600, generator=random) < 0.9).float()
    ours = dense * (torch.rand(1, 600, generator=random) < 0.7)
    found = retained(ours, dense)
    ratio = float(ours.mean() / dense.mean())
    spread = float((ours - ratio * dense).std()) / float(dense.mean()) / math.sqrt(600)
    assert found.value == pytest.approx(ratio)
    assert found.low == pytest.approx(ratio - 1.96 * spread, abs=0.03 * spread)
    assert found.high == pytest.approx(ratio + 1.96 * spread, abs=0.03 * spread)


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
    assert excess(window, dense) == pytest.approx((0.3, 0.3, 0.3), abs=1e-5)
    assert gap_closed(dense[:, :1] + 0.06, dense[:, :1], window[:, :1]).high == math.inf


def test_what_is_undefined_is_nan():
    nothing = torch.zeros(3, 10)
    assert all(math.isnan(number) for number in retained(nothing, nothing))
    same = torch.ones(3, 10)
    assert all(math.isnan(number) for number in gap_closed(same, same, same))
