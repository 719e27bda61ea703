"""Write settings as YAML, so that a run can show and keep its settings with all defaults."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml


def to_yaml(settings: Any) -> str:
    """Convert a dataclass instance to YAML text with all defaults; `build_dataclass` inverts it."""
    return yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
