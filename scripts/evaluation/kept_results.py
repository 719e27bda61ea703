"""What was found once is kept in a file, with the CPU time that it took."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def read_result(path: Path, about: Result) -> Result | None:
    """What was found before of the same."""
    if not path.is_file():
        return None
    known = json.loads(path.read_text())
    return known["found"] if known["about"] == json.loads(json.dumps(about)) else None


def write_result(path: Path, about: Result, find: Callable[[], Result]) -> Result:
    """Find something and keep it, with the CPU-seconds that it took."""
    started, begun = cpu_seconds(), time.perf_counter()
    found = find()
    found |= {"cpu": cpu_seconds() - started, "seconds": time.perf_counter() - begun}
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({"about": about, "found": found}, indent=2) + "\n")
    os.replace(aside, path)
    return found


def cpu_seconds() -> float:
    """Of this process and those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
