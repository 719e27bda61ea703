"""The Python files that a folder's ``auto_map`` names: copied for other programs, never run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_REFERENCE = re.compile(r"(\w+)\.\w+")


def copy_code(source: Path, target: Path, auto_map: Mapping[str, Any]) -> None:
    """Copy the code that ``auto_map`` names, as far as the source has it.

    Args:
        source: The model's folder; another path, as the name of a hub's model, has no code.
        target: A folder.
        auto_map: Of ``config.json``.
    """
    for name in _modules(auto_map):
        file = source / f"{name}.py"
        if file.is_file() and source.resolve() != target.resolve():
            shutil.copyfile(file, target / file.name)


def _modules(auto_map: Mapping[str, Any]) -> set[str]:
    """Names of modules beside ``config.json``; references to other repositories are none."""
    matches = (_REFERENCE.fullmatch(r) for r in auto_map.values() if isinstance(r, str))
    return {match[1] for match in matches if match}
