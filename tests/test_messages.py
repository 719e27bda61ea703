"""Messages of commands that share a terminal."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.checkout import environment

LINES = 400
COMMAND = f"""
from commands.messages import say
for i in range({LINES}):
    say(f"{{i}} of a process")
"""


def test_lines_of_processes_that_share_a_terminal_never_mix():
    reader, writer = os.pipe()
    unbuffered = {**environment(), "PYTHONUNBUFFERED": "1"}  # print writes the end of a line alone
    command = [sys.executable, "-c", COMMAND]
    pair = [subprocess.Popen(command, env=unbuffered, stderr=writer) for _ in range(2)]
    os.close(writer)
    with open(reader) as terminal:
        lines = terminal.read().splitlines()
    assert [process.wait(60) for process in pair] == [0, 0]
    assert sorted(lines) == sorted(2 * [f"{i} of a process" for i in range(LINES)])
