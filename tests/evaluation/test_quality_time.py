"""Quality and time of the same settings, joined from two CSVs."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest

from evaluation.quality_time import front, points, table

QUALITY = [
    # tuned, run, task, seed, hits
    ("dense", "dense", "keys12", "0", 10),
    ("dense", "dense", "keys12", "1", 8),
    ("dense", "dense", "chain1", "0", 1),
    ("dense", "fine", "keys12", "0", 10),
    ("dense", "fine", "keys12", "1", 6),
    ("fine", "fine", "keys12", "0", 9),
    ("dense", "coarse", "keys12", "0", 5),
    ("dense", "coarse", "keys12", "1", 4),
    ("dense", "unknown", "keys12", "0", 5),
    ("fine", "dense", "keys12", "0", 10),
]
TIMES = [
    # op, settings, S, ms, date
    ("dense", "", 1024, 9.0, "old"),
    ("infllm_attention", "", 1024, 3.0, "old"),
    ("dense", "", 1024, 8.0, "new"),
    ("infllm_attention", "", 1024, 2.0, "new"),
    ("infllm_attention", "fine", 1024, 4.0, "new"),
    ("dense", "", 2048, 32.0, "new"),
    ("infllm_attention", "fine", 2048, 4.0, "new"),
]


def quality_rows() -> list[dict[str, str]]:
    names = ("tuned", "run", "task", "seed", "hits")
    return [dict(zip(names, map(str, row), strict=True)) for row in QUALITY]


def time_rows(heads: str = "4") -> list[dict[str, str]]:
    common = {"variant": "auto", "mode": "forward", "inputs": "text", "B": "1", "dtype": "float32"}
    common |= {"Hq": heads, "Hkv": "2", "D": "8", "device": "gpu"}
    return [
        common | {"op": op, "settings": name, "S": str(length), "ms_p50": str(ms), "date": date}
        for op, name, length, ms, date in TIMES
    ]


def found():
    return points(quality_rows(), time_rows(), ["keys12"], "coarse")


def test_shares_and_speed_ups_of_settings_that_both_files_have():
    free, trained, coarse = found()
    assert (free.settings, free.is_trained, free.kept) == ("fine", False, (16 / 18, 0.75, 1.0))
    assert (trained.settings, trained.is_trained) == ("fine", True)
    assert trained.kept == (0.9, 0.9, 0.9)  # only the seed that was answered
    assert (coarse.settings, coarse.kept) == ("coarse", (0.5, 0.5, 0.5))
    assert free.speed_up == trained.speed_up == {1024: 2.0, 2048: 8.0}
    assert coarse.speed_up == {1024: 4.0}  # of the newest run, not the old one's 3


def test_the_front_has_what_no_other_setting_beats():
    free, trained, coarse = found()
    assert front([free, coarse, trained], 1024) == [coarse, trained]
    assert front([free, coarse], 1024) == [free, coarse]
    assert front([free, coarse, trained], 2048) == [trained]  # coarse has no time there
    lines = table([free, coarse, trained]).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["fine", "coarse", "fine"]
    assert lines[3].split()[-1] == "4.00*"
    assert lines[2].split()[-2:] == ["2.00", "8.00"]


def test_what_cannot_be_joined_is_refused():
    with pytest.raises(ValueError, match="got none to chain3"):
        points(quality_rows(), time_rows(), ["keys12", "chain3"], "coarse")
    with pytest.raises(ValueError, match="got 4/2, 8/2: choose by --heads"):
        points(quality_rows(), time_rows() + time_rows("8"), ["keys12"], "coarse")
    some = [row for row in quality_rows() if row["run"] in ("dense", "unknown")]
    with pytest.raises(ValueError, match="variants of both configs need the same names"):
        points(some, time_rows(), ["keys12"], "coarse")


def test_the_command_prints_and_draws(tmp_path: Path, monkeypatch, capsys):
    from benchmarking.results import COLUMNS

    quality, times = tmp_path / "quality.csv", tmp_path / "times.csv"
    for path, rows, names in (
        (quality, quality_rows(), tuple(quality_rows()[0])),
        (times, time_rows(), COLUMNS),
    ):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(rows)
    command = importlib.import_module("plot_quality_time")

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["plot_quality_time.py", *arguments])
        return command.main()

    chosen = ("--tasks", "keys12", "--default", "coarse")
    assert run(str(quality), str(times), *chosen) == 0
    assert "0.889 (0.750 to 1.000)" in capsys.readouterr().out
    assert (tmp_path / "quality_time.png").stat().st_size > 1000
    assert run(str(quality), str(times), *chosen, "--heads", "9/3") == 2
    assert capsys.readouterr().err == "error: expected times of 9/3 heads, got none\n"
    assert run(str(times), str(times)) == 2
    assert "expected a CSV of scripts/quality.py" in capsys.readouterr().err
