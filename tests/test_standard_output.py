"""Commands whose output is not read to the end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.checkout import environment

IMPORTS = "import os, sys\nfrom commands.standard_output import run_command"
COMMAND = """
import sys
from commands.standard_output import run_command
def main():
    print("first", flush=True)
    sys.stdin.readline()
    for _ in range(LINES):
        print("x" * 100)
    sys.stderr.write("worked\\n")
    return 3
sys.exit(run_command(main))
"""


@pytest.mark.parametrize("lines", [1, 5000])
def test_work_and_status_do_not_depend_on_who_reads(lines):
    command = [sys.executable, "-c", COMMAND.replace("LINES", str(lines))]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=environment(), text=True, **pipes) as process:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == "worked\n"
        assert process.wait(30) == 3


def test_a_stopped_command_does_not_wait_for_threads():
    """Ctrl-C while a library starts a thread leaves one behind that nothing ends."""
    code = f"""
{IMPORTS}
import threading
def main():
    threading.Thread(target=threading.Event().wait).start()
    print("saved")
    return 130
sys.exit(run_command(main))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=30
    )
    assert (ended.stdout, ended.stderr, ended.returncode) == ("saved\n", "", 130)


def test_a_closed_output_is_no_error():
    code = f"{IMPORTS}\nsys.exit(run_command(lambda: 7))"
    command = ["sh", "-c", '"$0" -c "$1" >&-', sys.executable, code]
    assert subprocess.run(command, env=environment(), check=False).returncode == 7


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_unbuffered_output_is_seen_at_once(unbuffered):
    code = (
        f"{IMPORTS}\n"
        "def main():\n    print('seen')\n    os._exit(3)\n"  # without a flush
        "sys.exit(run_command(main))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment() | {"PYTHONUNBUFFERED": unbuffered},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stdout == ("seen\n" if unbuffered else "")
