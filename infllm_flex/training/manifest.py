"""Folders that are either whole or recognisably not: written aside, listed, synced, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from infllm_flex.training.together import everywhere, gather, on_first

MANIFEST = "MANIFEST.json"
_CHUNK = 2**20
_Files = dict[str, dict[str, int | str]]


class BrokenFolderError(ValueError):
    """A folder is not what its manifest says; the message says why."""


def publish(target: Path, write: Callable[[Path], None], replace: bool = False) -> None:
    """Make the folder ``target``, whole or not at all, whatever happens meanwhile.

    Everything is written to a hidden folder beside it, flushed to the disk, listed with sizes and
    checksums, and renamed.

    Args:
        target: A folder that does not exist, unless it is to be replaced.
        write: Puts flat files into the folder it is given.
        replace: Whether to remove a published folder of that name once the new one is whole.

    Raises:
        OSError: The disk is full or not writable; nothing is left behind.
    """
    aside = _aside(target, uuid.uuid4().hex)
    try:
        aside.mkdir(mode=0o700, parents=True)
        write(aside)
        names = sorted(path.name for path in aside.iterdir())
        _complete(aside, target, _seal(aside, names), replace)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def publish_together(target: Path, write: Callable[[Path], Iterable[str]]) -> None:
    """Make the folder ``target`` as `publish` does, with files from every process of the run.

    All must call it. Where it fails in one, it fails in all, and nothing is left behind.

    Args:
        target: A folder that does not exist, on a disk that the processes share.
        write: Puts flat files into the folder it is given and returns their names.

    Raises:
        OSError: This process could not write.
        RankError: Another one could not.
    """
    aside = _aside(target, gather(uuid.uuid4().hex)[0])
    try:
        on_first(lambda: aside.mkdir(mode=0o700, parents=True))
        sealed = everywhere(lambda: _seal(aside, write(aside)))
        merged: _Files = {}
        for part in gather(json.dumps(sealed)):
            merged |= json.loads(part)
        on_first(lambda: _complete(aside, target, merged))
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def clear_leftovers(folder: Path, name: str) -> None:
    """Remove what a crash left while a folder was written or discarded.

    Args:
        folder: Where the folders are.
        name: Regular expression of their names.
    """
    leftover = re.compile(rf"\.(tmp|trash)-({name})-[0-9a-f]{{32}}")
    for path in folder.iterdir():
        if leftover.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def discard(folder: Path) -> None:
    """Remove a published folder, so that half of it never bears the name of a whole one."""
    trash = folder.parent / f".trash-{folder.name}-{uuid.uuid4().hex}"
    os.rename(folder, trash)
    shutil.rmtree(trash)


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


def check_names(folder: Path, listed: _Files) -> None:
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
    if checksum and _describe(path) != expected:
        raise BrokenFolderError(f"{path.name} differs from its checksum")


def read_manifest(folder: Path) -> _Files:
    """The files a published folder should hold, by name, with ``size`` and ``sha256``.

    Raises:
        BrokenFolderError: There is no manifest, or it is not one of ours.
    """
    try:
        text = (folder / MANIFEST).read_text()
        listed = json.loads(text)["files"]
        files = {name: {"size": f["size"], "sha256": f["sha256"]} for name, f in listed.items()}
        # Byte for byte as it was written: a flipped bit in the list itself is noticed too.
        if text != _as_text(files) or not all("/" not in name for name in files):
            raise KeyError("files")
        return files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenFolderError(f"{MANIFEST} is missing or damaged") from error


def _aside(target: Path, nonce: str) -> Path:
    return target.parent / f".tmp-{target.name}-{nonce}"


def _seal(aside: Path, names: Iterable[str]) -> _Files:
    """Flush files to the disk and describe them."""
    files = {}
    for name in names:
        _sync(aside / name)
        files[name] = _describe(aside / name)
    return files


def _complete(aside: Path, target: Path, files: _Files, replace: bool = False) -> None:
    """Write the manifest and give the folder its name."""
    (aside / MANIFEST).write_text(_as_text(files))
    _sync(aside / MANIFEST)
    _sync(aside)
    if replace and target.exists():
        discard(target)
    os.rename(aside, target)
    _sync(target.parent)


def _as_text(files: _Files) -> str:
    return json.dumps({"format": 1, "files": dict(sorted(files.items()))}, indent=2) + "\n"


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
