"""Tables and speed-ups compare times of one run only."""

from __future__ import annotations

from benchmarking.report import Method, by_shape, speed_ups
from benchmarking.results import COLUMNS


def test_of_repeated_measurements_the_newest_counts():
    row = dict.fromkeys(COLUMNS, "") | {"op": "infllm_attention", "variant": "auto", "S": "8"}
    ((_, times),) = by_shape([row | {"ms_p50": "2"}, row | {"ms_p50": "3"}]).items()
    assert times == {Method("infllm_attention", "auto"): 3.0}


def test_times_of_different_runs_are_not_compared():
    def row(date, op, variant, ms):
        return dict.fromkeys(COLUMNS, "") | {
            "date": date,
            "op": op,
            "variant": variant,
            "S": "8",
            "ms_p50": str(ms),
        }

    rows = [
        row("1", "infllm_attention", "auto", 4),
        row("1", "dense", "sdpa_cudnn", 8),
        row("2", "infllm_attention", "auto", 2),
        row("2", "dense", "sdpa_cudnn", 6),
        row("3", "infllm_attention", "flex", 5),
        row("3", "dense", "sdpa_cudnn", 10),
        row("4", "infllm_attention", "auto", 2),
        row("4", "dense", "sdpa_flash", 30),  # not the fastest
    ]
    assert list(speed_ups(rows).values()) == [{"auto": 3.0, "flex": 2.0}]
    assert list(speed_ups(rows[:2]).values()) == [{"auto": 2.0}]
    assert speed_ups(rows[:1]) == {}
