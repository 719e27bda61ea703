"""Folders that are either whole or recognisably not: written aside, listed, synced, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

MANIFEST = "MANIFEST.json"
_CHUNK = 2**20


class BrokenFolderError(ValueError):
    """A folder is not what its manifest says; the message says why."""


def publish(target: Path, write: Callable[[Path], None]) -> None:
    """Make the folder ``target``, whole or not at all, whatever happens meanwhile.

    Everything is written to a hidden folder beside it, flushed to the disk, listed with sizes and
    checksums, and renamed.

    Args:
        target: A folder that does not exist.
        write: Puts flat files into the folder it is given.

    Raises:
        OSError: The disk is full or not writable; nothing is left behind.
    """
    aside = target.parent / f".tmp-{target.name}-{uuid.uuid4().hex}"
    aside.mkdir(mode=0o700, parents=True)
    try:
        write(aside)
        files = {path.name: _describe(path) for path in sorted(aside.iterdir())}
        for name in files:
            _sync(aside / name)
        text = json.dumps({"format": 1, "files": files}, indent=2) + "\n"
        (aside / MANIFEST).write_text(text)
        _sync(aside / MANIFEST)
        _sync(aside)
        os.rename(aside, target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def verify(folder: Path) -> None:
    """Compare every file of a published folder with its manifest, to the last bit.

    Raises:
        BrokenFolderError: A file is missing, added, linked elsewhere, or differs.
    """
    listed = read_manifest(folder)
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if missing := sorted(listed.keys() - present):
        raise BrokenFolderError(f"{missing[0]} is missing")
    if added := sorted(present - listed.keys()):
        raise BrokenFolderError(f"{added[0]} is not in {MANIFEST}")
    for name, expected in listed.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise BrokenFolderError(f"{name} is not a regular file")
        if path.stat().st_size != expected["size"]:
            raise BrokenFolderError(
                f"{name} has {path.stat().st_size} bytes, expected {expected['size']}"
            )
        if _describe(path) != expected:
            raise BrokenFolderError(f"{name} differs from its checksum")


def read_manifest(folder: Path) -> dict[str, dict[str, int | str]]:
    """The files a published folder should hold, by name, with ``size`` and ``sha256``.

    Raises:
        BrokenFolderError: There is no manifest, or it is not one of ours.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = manifest["files"]
        if manifest["format"] != 1 or not all("/" not in name for name in files):
            raise KeyError("format")
        return {name: {"size": f["size"], "sha256": f["sha256"]} for name, f in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenFolderError(f"{MANIFEST} is missing or damaged") from error


def _describe(path: Path) -> dict[str, int | str]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
