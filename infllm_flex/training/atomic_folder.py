"""Folders that are either whole or recognisably not: written aside, listed, synced, renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from infllm_flex.training.collectives import everywhere, gather, on_first
from infllm_flex.training.manifest import MANIFEST, Files, describe_file, manifest_text


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
        merged: Files = {}
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


def _aside(target: Path, nonce: str) -> Path:
    return target.parent / f".tmp-{target.name}-{nonce}"


def _seal(aside: Path, names: Iterable[str]) -> Files:
    """Flush files to the disk and describe them."""
    files = {}
    for name in names:
        _sync(aside / name)
        files[name] = describe_file(aside / name)
    return files


def _complete(aside: Path, target: Path, files: Files, replace: bool = False) -> None:
    """Write the manifest and give the folder its name."""
    (aside / MANIFEST).write_text(manifest_text(files))
    _sync(aside / MANIFEST)
    _sync(aside)
    if replace and target.exists():
        discard(target)
    os.rename(aside, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
