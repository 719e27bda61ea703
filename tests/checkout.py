"""The checkout under test, for processes that tests start."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, in which Python imports the packages of this checkout."""
    roots = [ROOT, ROOT / "custom_ops", ROOT / "scripts"]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots))} | variables
