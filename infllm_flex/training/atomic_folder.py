"""Atomic folders: written under a temporary name, listed, synced to disk and then renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from infllm_flex.training.collectives import all_gather_text, on_all_ranks, on_first_rank
from infllm_flex.training.manifest import MANIFEST, Files, describe_file, manifest_text


def publish(target: Path, write: Callable[[Path], None], replace: bool = False) -> None:
    """Create the folder ``target`` atomically: after a crash it is complete or absent.

    The files are written to a hidden folder beside it, flushed to disk and listed with sizes and
    checksums. The hidden folder is then renamed.

    Args:
        target: A folder that does not exist, unless ``replace`` is set.
        write: Writes files, without subfolders, into the folder it is given.
        replace: Remove an existing ``target`` once the new folder is complete.

    Raises:
        OSError: The disk is full or not writable. The hidden folder is removed.
    """
    temporary = _temporary_folder(target, uuid.uuid4().hex)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        names = sorted(path.name for path in temporary.iterdir())
        _finish(temporary, target, _sync_and_describe(temporary, names), replace)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish_from_all_ranks(target: Path, write: Callable[[Path], Iterable[str]]) -> None:
    """Like `publish`, with files from every process. All processes must call it.

    If one process fails, all of them raise, and the hidden folder is removed.

    Args:
        target: A folder that does not exist, on a disk shared by the processes.
        write: Writes files, without subfolders, into the folder it is given; returns their names.

    Raises:
        OSError: This process could not write.
        RankError: Another process could not write.
    """
    temporary = _temporary_folder(target, all_gather_text(uuid.uuid4().hex)[0])
    try:
        on_first_rank(lambda: temporary.mkdir(parents=True))
        own_files = on_all_ranks(lambda: _sync_and_describe(temporary, write(temporary)))
        files: Files = {}
        for part in all_gather_text(json.dumps(own_files)):
            files |= json.loads(part)
        on_first_rank(lambda: _finish(temporary, target, files))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove the hidden folders that a crash during `publish` or `discard` left.

    Args:
        folder: The parent of the published folders.
        name: Regular expression for their names.
    """
    leftover = re.compile(rf"\.(tmp|trash)-({name})-[0-9a-f]{{32}}")
    for path in folder.iterdir():
        if leftover.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def discard(folder: Path) -> None:
    """Remove a published folder. It is renamed first, so a crash leaves no partial folder."""
    trash = folder.parent / f".trash-{folder.name}-{uuid.uuid4().hex}"
    os.rename(folder, trash)
    shutil.rmtree(trash)


def _temporary_folder(target: Path, nonce: str) -> Path:
    return target.parent / f".tmp-{target.name}-{nonce}"


def _sync_and_describe(folder: Path, names: Iterable[str]) -> Files:
    files = {}
    # safetensors makes files that only their owner can read. Others may read what they may read of
    # the folder, which mkdir has made by the umask.
    mode = folder.stat().st_mode & 0o666
    for name in names:
        (folder / name).chmod(mode)
        _sync(folder / name)
        files[name] = describe_file(folder / name)
    return files


def _finish(temporary: Path, target: Path, files: Files, replace: bool = False) -> None:
    """Write the manifest and rename the folder."""
    (temporary / MANIFEST).write_text(manifest_text(files))
    _sync(temporary / MANIFEST)
    _sync(temporary)
    if replace and target.exists():
        discard(target)
    os.rename(temporary, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
