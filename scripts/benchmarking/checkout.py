"""The checkout that holds the measured code, for processes that measure in it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python_environment() -> dict[str, str]:
    """This process's environment, in which Python imports the packages of this checkout first."""
    roots = [ROOT, ROOT / "custom_ops", ROOT / "scripts", os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(str(root) for root in roots if str(root))}
