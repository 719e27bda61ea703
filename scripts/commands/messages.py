"""Messages that several commands print."""

from __future__ import annotations

import sys
import warnings

NO_PLOT = "no plot: pip install '.[plot]'"


def say(line: str) -> None:
    """Print a line on standard error at once.

    The line and its end are one write, so that lines of processes that share a terminal never mix:
    with `PYTHONUNBUFFERED`, `print` writes the end by itself.
    """
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def show_warnings(show: bool = True) -> None:
    """Print each warning from now on as one line, without its source line.

    Args:
        show: False prints none, for a process beside one that prints them.
    """

    def print_warning(message: Warning | str, *_: object, **__: object) -> None:
        if show:
            say(f"warning: {message}")

    warnings.showwarning = print_warning
