"""The Python files named by a folder's ``auto_map``: copied for other programs, never run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_REFERENCE = re.compile(r"(\w+)\.\w+")
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def copy_code(source: Path, target: Path, auto_map: Mapping[str, Any]) -> None:
    """Copy the code files named by ``auto_map`` that exist in the source.

    Args:
        source: The model's folder. A name on the hub is no folder, so it has no files.
        target: A folder.
        auto_map: As in ``config.json``.
    """
    for name in _modules(auto_map):
        file = source / f"{name}.py"
        if file.is_file() and source.resolve() != target.resolve():
            shutil.copyfile(file, target / file.name)


def refer_to_hub(source: str, auto_map: Mapping[str, Any]) -> dict[str, Any]:
    """Return an ``auto_map`` valid in any folder: code on the hub is named with its model.

    Args:
        source: The folder or the name on the hub that the model was read from. For a folder nothing
            changes.
        auto_map: As in its ``config.json``.
    """
    if Path(source).exists() or not _HUB.fullmatch(source):
        return dict(auto_map)
    return {name: f"{source}--{r}" if _is_beside(r) else r for name, r in auto_map.items()}


def _is_beside(reference: object) -> bool:
    return isinstance(reference, str) and _REFERENCE.fullmatch(reference) is not None


def _modules(auto_map: Mapping[str, Any]) -> set[str]:
    """Return the modules beside ``config.json``; references to other repositories are left out."""
    return {reference.split(".")[0] for reference in auto_map.values() if _is_beside(reference)}
