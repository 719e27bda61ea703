"""Checks of output files before long work."""

from __future__ import annotations

import os
from pathlib import Path


def check_output(name: str, path: Path) -> None:
    """Check that a file can be written, and make nothing.

    Args:
        name: Name of the setting or option, for the message.
        path: The file. Folders that do not exist can be made later.

    Raises:
        ValueError: It is a folder, or lies where none can be made or written to.
    """
    if path.is_dir():
        raise ValueError(f"{name} must be a file, {path} is a folder: add a file name")
    place = next(folder for folder in path.absolute().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{name} must lie in a folder that can be written to, got {path}")
