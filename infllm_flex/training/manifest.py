"""The manifest of a published folder: its files with sizes and checksums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

MANIFEST = "MANIFEST.json"
_CHUNK = 2**20
Files = dict[str, dict[str, int | str]]


class BrokenFolderError(ValueError):
    """A folder does not match its manifest; the message says how."""


def verify(folder: Path, checksums: bool = True) -> None:
    """Compare every file of a published folder with its manifest.

    Args:
        folder: The folder.
        checksums: False compares names and sizes only, without reading the files.

    Raises:
        BrokenFolderError: A file is missing, added, a link, or differs.
    """
    listed = read_manifest(folder)
    check_names(folder, listed)
    for name, expected in listed.items():
        check_file(folder / name, expected, checksums)


def check_names(folder: Path, listed: Files) -> None:
    """Compare the names of a folder's files with its manifest.

    Raises:
        BrokenFolderError: A file is missing or added.
    """
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if missing := sorted(listed.keys() - present):
        raise BrokenFolderError(f"{missing[0]} is missing")
    if added := sorted(present - listed.keys()):
        raise BrokenFolderError(f"{added[0]} is not in {MANIFEST}")


def check_file(path: Path, expected: dict[str, int | str], checksum: bool = True) -> None:
    """Compare one file with its entry in the manifest.

    Raises:
        BrokenFolderError: The file differs.
    """
    if path.is_symlink() or not path.is_file():
        raise BrokenFolderError(f"{path.name} is not a regular file")
    if path.stat().st_size != expected["size"]:
        raise BrokenFolderError(
            f"{path.name} has {path.stat().st_size} bytes, expected {expected['size']}"
        )
    if checksum and describe_file(path) != expected:
        raise BrokenFolderError(f"{path.name} differs from its checksum")


def read_manifest(folder: Path) -> Files:
    """The expected files of a published folder by name, each with ``size`` and ``sha256``.

    Raises:
        BrokenFolderError: The manifest is missing or damaged.
    """
    try:
        text = (folder / MANIFEST).read_text()
        listed = json.loads(text)["files"]
        files = {name: {"size": f["size"], "sha256": f["sha256"]} for name, f in listed.items()}
        # The comparison also detects a flipped bit in the manifest itself.
        if text != manifest_text(files) or not all("/" not in name for name in files):
            raise KeyError("files")
        return files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenFolderError(f"{MANIFEST} is missing or damaged") from error


def manifest_text(files: Files) -> str:
    """The text of a manifest."""
    return json.dumps({"format": 1, "files": dict(sorted(files.items()))}, indent=2) + "\n"


def describe_file(path: Path) -> dict[str, int | str]:
    """Size and checksum of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}
