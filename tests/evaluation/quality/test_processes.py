"""Signals to the processes of one command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.checkout import environment

# Counts the signals it gets in the half second after the first.
CHILD = """
import os, pathlib, signal, time
from evaluation.quality.processes import stop_with_parent
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: got.append(number))
file = pathlib.Path({folder!r}) / str(os.getpid())
stop_with_parent()
file.touch()
while not got:
    time.sleep(0.02)
time.sleep(0.5)
file.with_suffix(".part").write_text(" ".join(map(str, map(int, got))))
file.with_suffix(".part").rename(file.with_suffix(".got"))
"""
PARENT = """
import signal, sys
from evaluation.quality.processes import run_in_processes
def stop(number, _):
    raise SystemExit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where nohup runs the tests
run_in_processes(["-c", sys.argv[1]], 2, False)
"""


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def parent(tmp_path):
    """A process whose two children have started."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD.format(folder=str(tmp_path))],
        env=environment(OMP_NUM_THREADS="1"),
        start_new_session=True,  # its own group, as a shell gives to a command
    )
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    yield process
    process.kill()
    process.wait()


def signals_of(folder):
    wait_for(lambda: len(list(folder.glob("*.got"))) == 2)
    return [list(map(int, path.read_text().split())) for path in folder.glob("*.got")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_reaches_each_process_once(parent, tmp_path, number):
    os.killpg(parent.pid, number)  # as Ctrl-C in a terminal does
    assert parent.wait(60) == 128 + number
    assert signals_of(tmp_path) == [[signal.SIGTERM]] * 2


def test_a_second_signal_is_passed_on_too(parent, tmp_path):
    parent.terminate()
    time.sleep(0.2)
    parent.terminate()
    assert parent.wait(60) == 128 + signal.SIGTERM
    assert signals_of(tmp_path) == [[signal.SIGTERM] * 2] * 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_processes_stop_when_the_one_that_started_them_is_killed(parent, tmp_path, number):
    parent.send_signal(number)
    assert signals_of(tmp_path) == [[signal.SIGTERM]] * 2
