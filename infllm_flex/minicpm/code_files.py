"""The Python files that a folder's ``auto_map`` names: copied for other programs, never run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_REFERENCE = re.compile(r"(\w+)\.\w+")
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


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


def refer_to_hub(source: str, auto_map: Mapping[str, Any]) -> dict[str, Any]:
    """``auto_map`` for any folder: code beside a model of the hub is named with the model.

    Args:
        source: What the model has been read from; a folder changes nothing.
        auto_map: Of its ``config.json``.
    """
    if Path(source).exists() or not _HUB.fullmatch(source):
        return dict(auto_map)
    return {name: f"{source}--{r}" if _is_beside(r) else r for name, r in auto_map.items()}


def _is_beside(reference: object) -> bool:
    return isinstance(reference, str) and _REFERENCE.fullmatch(reference) is not None


def _modules(auto_map: Mapping[str, Any]) -> set[str]:
    """Names of modules beside ``config.json``; references to other repositories are none."""
    return {reference.split(".")[0] for reference in auto_map.values() if _is_beside(reference)}
