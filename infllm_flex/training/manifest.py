"""What a folder should hold, to the last bit: its files with sizes and checksums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

MANIFEST = "MANIFEST.json"
_CHUNK = 2**20
Files = dict[str, dict[str, int | str]]


class BrokenFolderError(ValueError):
    """A folder is not what its manifest says; the message says why."""


def verify(folder: Path, checksums: bool = True) -> None:
    """Compare every file of a published folder with its manifest, to the last bit.

    Args:
        folder: The folder.
        checksums: False to compare names and sizes only, without reading the files.

    Raises:
        BrokenFolderError: A file is missing, added, linked elsewhere, or differs.
    """
    listed = read_manifest(folder)
    check_names(folder, listed)
    for name, expected in listed.items():
        check_file(folder / name, expected, checksums)


def check_names(folder: Path, listed: Files) -> None:
    """Compare which files a folder holds with its manifest.

    Raises:
        BrokenFolderError: A file is missing or added.
    """
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if missing := sorted(listed.keys() - present):
        raise BrokenFolderError(f"{missing[0]} is missing")
    if added := sorted(present - listed.keys()):
        raise BrokenFolderError(f"{added[0]} is not in {MANIFEST}")


def check_file(path: Path, expected: dict[str, int | str], checksum: bool = True) -> None:
    """Compare one file with its line in the manifest.

    Raises:
        BrokenFolderError: It differs.
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
    """The files a published folder should hold, by name, with ``size`` and ``sha256``.

    Raises:
        BrokenFolderError: There is no manifest, or it is not one of ours.
    """
    try:
        text = (folder / MANIFEST).read_text()
        listed = json.loads(text)["files"]
        files = {name: {"size": f["size"], "sha256": f["sha256"]} for name, f in listed.items()}
        # Byte for byte as it was written: a flipped bit in the list itself is noticed too.
        if text != manifest_text(files) or not all("/" not in name for name in files):
            raise KeyError("files")
        return files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenFolderError(f"{MANIFEST} is missing or damaged") from error


def manifest_text(files: Files) -> str:
    """The one way to write a manifest down."""
    return json.dumps({"format": 1, "files": dict(sorted(files.items()))}, indent=2) + "\n"


def describe_file(path: Path) -> dict[str, int | str]:
    """Size and checksum of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}
