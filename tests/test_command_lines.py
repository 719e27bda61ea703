"""Settings of a command may stand anywhere among its options."""

import re
import subprocess
import sys

import pytest

from tests.checkout import ROOT

TAKES_SETTINGS = re.compile(r'nargs="\*", metavar="\w+\.key=value"')
SCRIPTS = [
    path
    for path in sorted((ROOT / "scripts").glob("*.py"))
    if TAKES_SETTINGS.search(path.read_text())
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_that_takes_settings_takes_them_among_its_options(path):
    """`parse_args` takes all of them from one place, and calls the others unrecognized."""
    text = path.read_text()
    assert "parse_intermixed_args(" in text
    assert not re.search(r"\bparse_args\(", text)


def test_settings_before_and_after_an_option_count():
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", "run.threads=3"]
    command += ["--config", ROOT / "configs" / "bench_cpu.yaml", "run.seed=7", "--print-config"]
    done = subprocess.run([*command, "run.rounds=9"], capture_output=True, text=True, check=True)
    for line in ("threads: 3", "seed: 7", "rounds: 9"):
        assert f"  {line}\n" in done.stdout
