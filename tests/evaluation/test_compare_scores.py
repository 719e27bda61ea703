"""Scores of blocks compared on tiny models: the command, its rows, and what it does not repeat."""

import csv
import subprocess
import sys

import pytest

from tests.checkout import ROOT, environment

SHORT = ["stages.short.steps=2", "stages.short.warmup_steps=1", "stages.short.decay_steps=1"]
LONG = ["stages.long.steps=2", "stages.long.warmup_steps=1", "stages.long.decay_steps=1"]
SMALL = ["model.tiny.head_dim=16", "stages.short.batch_size=2", "stages.long.batch_size=1"]


def run(*arguments):
    command = [sys.executable, "scripts/compare_scores.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def test_every_model_answers_the_same_questions_once(tmp_path):
    table = tmp_path / "scores.csv"
    arguments = ["--heads", "4/2", "--seeds", 3, "--table", table, f"run.folder={tmp_path}/run"]
    first = run(*arguments, *SHORT, *LONG, *SMALL)
    assert first.returncode == 0, first.stderr
    with table.open() as file:
        rows = list(csv.DictReader(file))
    ways = [(row["tuned"], row["run"]) for row in rows]
    assert ways == [
        ("dense", "dense"),
        ("dense", "every key"),
        ("dense", "every key, 1/4 of dims"),
        ("dense", "means of 32"),
        ("dense", "window only"),
        ("every key", "every key"),
        ("every key, 1/4 of dims", "every key, 1/4 of dims"),
        ("means of 32", "means of 32"),
    ]
    assert len({row["items"] for row in rows}) == 1
    assert all((row["Hq"], row["Hkv"], row["seed"]) == ("4", "2", "3") for row in rows)
    saved = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(saved) == 4
    again = run(*arguments, *SHORT, *LONG, *SMALL)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in saved} == saved
    assert again.stdout == first.stdout


def test_what_cannot_be_done_is_refused_before_any_work(tmp_path):
    settings = [f"run.folder={tmp_path}/run", "--heads", "4/2"]
    found = run(*settings, "--seeds", 1, 1, "--table", tmp_path / "scores.csv")
    assert found.returncode == 2
    assert "--seeds must name no seed twice, got [1, 1]" in found.stderr
    found = run(*settings, "--table", tmp_path / "scores.csv", "model.tiny.head_dim=24")
    assert (found.returncode, found.stdout) == (2, "")
    assert "model.tiny.head_dim must be a multiple of 16" in found.stderr
    found = run(*settings, "--seeds", 1, "--table", tmp_path)
    assert found.returncode == 2
    assert (
        found.stderr == f"error: --table must be a file, {tmp_path} is a folder: add a file name\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("heads", ["16-1", "16/3", "0/1"])
def test_heads_that_do_not_divide_are_refused_in_one_line(heads, tmp_path):
    found = run("--heads", heads, "--table", tmp_path / "scores.csv")
    assert found.returncode == 2
    assert "expected a pair such as 16/1" in found.stderr
