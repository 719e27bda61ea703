"""DDP and FSDP2 in two processes, patched before or after, give one process's gradients."""

import socket
import subprocess
import sys

import pytest

from tests.checkout import ROOT, environment
from tests.patch.distributed import CASES, MODELS, WORLD

SECONDS = 300


@pytest.fixture(scope="module")
def outcomes():
    """The outcome of every model and case, from one run of both processes for all tests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.patch.distributed"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), str(port)],
            cwd=ROOT,
            env=environment(OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        text, _ = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = (line.partition(": ") for line in text.splitlines())
    return {before: after for before, _, after in lines} | {"text": text}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_of_one_process(outcomes, model, case):
    assert outcomes.get(f"{model}, {case}", outcomes["text"]) == "ok"
