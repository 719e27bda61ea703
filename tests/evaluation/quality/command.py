"""Run scripts/quality.py in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from evaluation.quality.parts import Folder
from evaluation.quality.plan import plan
from evaluation.quality.settings import QualitySettings
from infllm_flex.strict_yaml import build_dataclass, load_yaml
from tests.checkout import ROOT, environment


def start(config, *arguments, **options):
    command = [sys.executable, str(ROOT / "scripts/quality.py"), "--config", str(config)]
    return subprocess.Popen(
        [*command, *arguments],
        env=environment(OMP_NUM_THREADS="1"),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def run(config, *arguments):
    process = start(config, *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def interrupt(process, is_time, number=signal.SIGTERM):
    """Send a signal to a command once it is time, and check what the command says."""
    deadline = time.monotonic() + 120
    while not is_time():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert err.strip().endswith("run the same command to continue after the last finished part")


def parts_of(config):
    settings = build_dataclass(QualitySettings, load_yaml(config))
    folder, parts = Folder(settings.run.folder), plan(settings)
    return {part.name: folder.result(part) for part in parts}
