"""Parts are done once: after an interruption, and by several processes of one folder."""

from __future__ import annotations

import json
import re
import signal

import pytest

from evaluation.quality.processes import run_in_processes
from tests.evaluation.quality.command import interrupt, parts_of, run, start


def test_an_interrupted_run_goes_on_where_it_was(config):
    interrupt(start(config), lambda: parts_of(config)["train:dense:0"] is not None)
    done = {name for name, result in parts_of(config).items() if result is not None}
    assert {"base", "text", "train:dense:0"} <= done < set(parts_of(config))
    status, out, err = run(config, "--parts", "judge:dense:*,judge:fine:0:nats")
    assert status == 0, err
    # No part is done twice; only the given parts, and those they need, are done.
    begun = [line.split()[0] for line in err.splitlines() if line.endswith(" ...")]
    assert not done & set(begun)
    assert {"judge:dense:0:retrieval", "judge:dense:0:nats"} <= done | set(begun)
    assert "train:fine:0" in begun
    assert not any("window" in name for name in begun)
    assert "parts are not done" in out


@pytest.mark.slow
def test_a_training_that_is_stopped_is_saved_and_goes_on(config, tmp_path):
    more = ("tuning.steps=80", "--parts", "train:dense:0")
    metrics = tmp_path / "run" / "models" / "dense-0" / "metrics.jsonl"
    process = start(config, *more)
    interrupt(process, lambda: metrics.exists() and metrics.read_text(), signal.SIGINT)
    (saved,) = (metrics.parent / "checkpoints").glob("step*")
    assert 10 <= int(re.search(r"\d+", saved.name)[0]) < 80
    status, _, err = run(config, *more)
    assert status == 0, err
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(10, 81, 10))
    assert not (metrics.parent / "checkpoints").exists()


def test_processes_that_share_a_folder_do_each_part_once(config):
    pair = [start(config, "--parts", "train:dense:0,judge:dense:*") for _ in range(2)]
    errors = []
    for process in pair:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        errors.append(err)
    begun = [line for err in errors for line in err.splitlines() if line.endswith(" ...")]
    assert len(begun) == len(set(begun)) == 5


def test_one_command_starts_processes_that_share_the_parts(config):
    status, out, err = run(
        config, "--parts", "judge:dense:0:*,judge:fine:0:nats", "--processes", "2"
    )
    assert status == 0, err
    begun = [line for line in err.splitlines() if line.endswith(" ...")]
    assert len(begun) == len(set(begun)) == 7
    assert out.count("Accuracy at") == 1  # one table, of what all of them have done
    assert out.count("fine ") == 1


def test_processes_stop_together_and_leave_what_is_done(config):
    process = start(config, "--processes", "2")
    interrupt(process, lambda: parts_of(config)["text"] is not None)
    status, _, err = run(config, "--processes", "0")
    assert status == 2
    assert err.endswith("--processes must be at least 1, got 0\n")


@pytest.mark.parametrize(
    ("chosen", "uses_gpus", "seen"),
    [("3,GPU-7", True, ["3", "GPU-7", "3"]), ("3", False, ["3"] * 3), ("", True, [""] * 3)],
)
def test_processes_are_spread_over_the_visible_gpus(monkeypatch, tmp_path, chosen, uses_gpus, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    code = f"""import os, pathlib
file = pathlib.Path({str(tmp_path)!r}) / str(os.getpid())
file.write_text(os.environ["CUDA_VISIBLE_DEVICES"])"""
    assert run_in_processes(["-c", code], 3, uses_gpus) == 0
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == sorted(seen)
    assert run_in_processes(["-c", "raise SystemExit(7)"], 2, uses_gpus) == 7
