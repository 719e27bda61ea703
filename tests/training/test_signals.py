"""A stop signal is announced at once, ends the run after the step, and is handled once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from infllm_flex.training.checkpoints import newest
from infllm_flex.training.loop import train
from infllm_flex.training.signals import StopSignal
from tests.training.runs import (
    settings,
)


def test_sigterm_saves_too_and_the_handlers_are_restored(tmp_path, texts, stop_at):
    handler = signal.getsignal(signal.SIGTERM)
    run = settings(tmp_path / "run", texts)
    stop_at(2, signal.SIGTERM)
    outcome = train(run, show=False)
    assert (outcome.step, outcome.signal) == (2, signal.SIGTERM)
    assert newest(run.run.folder / "checkpoints") == outcome.checkpoint
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal, time\n"
        "from infllm_flex.training.signals import StopSignal\n"
        "with StopSignal() as interruption:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert interruption.signal == signal.SIGTERM\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], timeout=30, check=False)
    assert ended.returncode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_announced_while_no_python_runs(number):
    """A hash in C stands for a backward pass: the main thread runs no Python meanwhile."""
    code = (
        "import hashlib\n"
        "from infllm_flex.training.signals import StopSignal\n"
        "with StopSignal():\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10 ** 8)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)  # now it is in the hash, which takes half a minute
    began = time.monotonic()
    process.send_signal(number)
    assert process.stderr.readline() == "\n"
    assert "saving after this step, then stopping" in process.stderr.readline()
    process.send_signal(number)
    assert process.wait(timeout=30) == -number
    assert time.monotonic() - began < 5
    process.stdout.close()
    process.stderr.close()


def test_a_run_without_show_announces_no_signal(tmp_path, texts, stop_at, capfd):
    for show in (True, False):
        stop_at(1)
        train(settings(tmp_path / str(show), texts), show=show)
        assert ("Ctrl-C: saving after this step" in capfd.readouterr().err) == show


def test_the_handlers_and_the_wakeup_descriptor_are_restored():
    before = (
        signal.set_wakeup_fd(-1),
        [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
    )
    threads = threading.active_count()
    with StopSignal(show=False) as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signal == signal.SIGTERM
    assert (
        signal.set_wakeup_fd(-1),
        [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
    ) == before
    assert threading.active_count() == threads
