"""End a command: one whose standard output nobody reads to the end, and one that was stopped."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

_SIGNALS = 128  # plus its number is the status of a command that a signal stopped


class _Output(io.FileIO):
    """Standard output that drops what no process reads any more."""

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]  # a buffer
        except BrokenPipeError:
            return memoryview(data).nbytes  # type: ignore[arg-type]


def run_command(main: Callable[[], int]) -> int:
    """Run a command; its work and its exit status do not depend on who reads its output.

    A command that a signal stopped ends without waiting for threads. A library that was interrupted
    while it started one may have lost it, and Python would wait for it forever.

    Args:
        main: The command.

    Returns:
        Its exit status.
    """
    status = _run(main)
    if status > _SIGNALS:
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(main: Callable[[], int]) -> int:
    before = sys.stdout
    if sys.__stdout__ is not before or not isinstance(before, io.TextIOWrapper):
        # Closed, or replaced by a caller.
        return main()
    raw = _Output(before.fileno(), "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        # PYTHONUNBUFFERED asks for no buffer.
        raw if before.write_through else io.BufferedWriter(raw),
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=before.line_buffering,
        write_through=before.write_through,
    )
    try:
        return main()
    finally:
        sys.stdout.flush()
        sys.stdout = before
