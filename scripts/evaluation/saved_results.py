"""Results in files, with the CPU time of the computation, so that none is computed twice."""

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
    """Read a saved result; None where there is none, or its ``about`` differs."""
    if not path.is_file():
        return None
    known = json.loads(path.read_text())
    return known["found"] if known["about"] == json.loads(json.dumps(about)) else None


def write_result(path: Path, about: Result, compute: Callable[[], Result]) -> Result:
    """Compute a result and save it, with the CPU-seconds and the seconds of the computation."""
    started, begun = cpu_seconds(), time.perf_counter()
    found = compute()
    found |= {"cpu": cpu_seconds() - started, "seconds": time.perf_counter() - begun}
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({"about": about, "found": found}, indent=2) + "\n")
    os.replace(aside, path)
    return found


def cpu_seconds() -> float:
    """Return the CPU-seconds of this process and of the children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
