"""After kill -9 at any moment, a run repeats the lost steps and ends in the same bits."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from dataclasses import replace

import pytest

from infllm_flex.training.loop import train
from infllm_flex.training.settings import CheckpointSettings, DataSettings
from tests.training.forked import start, start_ranks
from tests.training.runs import course, settings, stage, weights_hash, write_lines

KILLS = 25


def resume(run):
    train(run, resume=True, show=False)


def kill_after(child, seconds):
    """Kill the process; returns False if it had already ended without error."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.fixture
def run(tmp_path):
    texts = [f"{i} is a number. " * (i % 7 + 1) for i in range(90)]
    path = write_lines(tmp_path / "a.jsonl", texts)
    return settings(
        tmp_path / "straight",
        tmp_path,
        data=DataSettings(source=str(path), packing="documents", held_out_percent=0),
        stages={
            "short": stage(steps=6, max_length=32),
            "long": stage(steps=14, max_length=64, rope_theta=50_000.0),
        },
        checkpoint=CheckpointSettings(every=2),
    )


def steps_of(folder):
    found = (re.fullmatch(r"step-(\d{8})", name) for name in os.listdir(folder))
    return sorted(int(match[1]) for match in found if match)


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(tmp_path, run):
    expected = weights_hash(train(run, show=False).model)
    again = replace(run, run=replace(run.run, folder=tmp_path / "again"))
    began = time.monotonic()  # imports are done, as in the forked processes
    train(again, show=False)
    duration = time.monotonic() - began
    rng = random.Random(0)
    kills = runs = 0
    while kills < KILLS:
        runs += 1
        killed = replace(run, run=replace(run.run, folder=tmp_path / f"killed-{runs}"))
        folder = killed.run.folder / "checkpoints"
        best = 0
        while kill_after(start(resume, killed), rng.uniform(0.1, 0.7) * duration):
            kills += 1
            steps = steps_of(folder) if folder.is_dir() else []
            assert not steps or steps[-1] >= best, "a complete checkpoint was lost"
            best = max([best, *steps])
        assert weights_hash(killed.run.folder / "model") == expected
        left = [n for n in os.listdir(folder) if not re.fullmatch(r"step-\d{8}", n)]
        assert not left, "leftovers of a kill were not removed"
        assert course(killed) == course(run)


def test_a_run_of_two_processes_ends_in_the_same_bits_after_one_is_killed(tmp_path, run):
    """The other process notices and ends; both resume from the last complete checkpoint."""
    assert ended(start_ranks(2, tmp_path, resume, run)) == [0, 0]
    expected = weights_hash(run.run.folder / "model")
    killed = replace(run, run=replace(run.run, folder=tmp_path / "killed"))
    rng, best, kills = random.Random(1), 0, 0
    for victim in (0, 1, 1, 0):
        processes = start_ranks(2, tmp_path, resume, killed)
        was_killed = kill_after(processes[victim], rng.uniform(0.2, 1.2))
        kills += was_killed
        (status,) = ended([processes[1 - victim]])
        # The other process does not need one that is killed in its last moments.
        assert status in ((0, 1) if was_killed else (0,))
        folder = killed.run.folder / "checkpoints"
        steps = steps_of(folder) if folder.is_dir() else []
        assert not steps or steps[-1] >= best, "a complete checkpoint was lost"
        best = max([best, *steps])
    assert kills
    assert ended(start_ranks(2, tmp_path, resume, killed)) == [0, 0]
    assert weights_hash(killed.run.folder / "model") == expected


def ended(processes):
    """Wait for the processes; returns their statuses."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
