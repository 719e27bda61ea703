"""Export a checkpoint, written by any number of processes, as a transformers model folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch

from infllm_flex.minicpm.code_files import copy_code
from infllm_flex.training.atomic_folder import publish, remove_leftovers
from infllm_flex.training.checkpoints.contents import CONFIG, MODEL, read_state
from infllm_flex.training.checkpoints.errors import CheckpointError
from infllm_flex.training.checkpoints.keeping import newest
from infllm_flex.training.checkpoints.shards import Outline, read_on_this_rank, read_outline
from infllm_flex.training.manifest import (
    MANIFEST,
    BrokenFolderError,
    check_file,
    read_manifest,
)

_INDEX = "model.safetensors.index.json"
_SOURCE = "checkpoint.json"
_FILE_BYTES = 5 * 10**9
# Files of the original model that are copied: its tokenizer and generation settings.
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


def export(checkpoint: Path, target: Path, origin: Path | None = None) -> Path:
    """Write the unsharded weights of a checkpoint, a few gigabytes at a time, in this process.

    Args:
        checkpoint: A checkpoint that `newest` returned.
        target: The model folder. An earlier export is replaced; a folder with other files, beside
            an export or alone, is refused.
        origin: The model folder that training started from. Its tokenizer is copied, and the code
            that the model's ``auto_map`` names.

    Returns:
        ``target``.

    Raises:
        FileExistsError: ``target`` holds other files.
        CheckpointError: This version does not read the checkpoint's format.
        OSError: The disk is full or not writable; ``target`` is unchanged.
    """
    from safetensors import SafetensorError

    read_state(checkpoint)
    if other := other_file(target):
        raise FileExistsError(
            f"{target} holds other files ({other}): move them away, or choose another folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, re.escape(target.name))
    try:
        publish(target, lambda folder: _write(folder, checkpoint, origin), replace=True)
    except (OSError, SafetensorError) as error:  # the latter for a full disk
        raise OSError(
            f"{target} was not written: {error}; {checkpoint} is kept: make "
            "room and run this again, a training with --resume"
        ) from error
    return target


def export_newest(folder: Path, target: Path, origin: Path | None = None) -> Path:
    """`export` the newest undamaged checkpoint of a folder; a training may be running there.

    Raises:
        CheckpointError: There is no usable checkpoint.
    """
    checkpoint = newest(folder)
    if checkpoint is None:
        raise CheckpointError(f"{folder}: there is no checkpoint to export")
    return export(checkpoint, target, origin)


def other_file(folder: Path) -> str | None:
    """The first file in a folder that `export` did not write, and so would be lost; None if none.

    The folder may be missing, and the files of an export may be damaged.
    """
    if not os.path.lexists(folder):
        return None
    if not folder.is_dir():
        return folder.name
    try:
        listed = read_manifest(folder)
    except BrokenFolderError:
        listed = {}
    own = {MANIFEST, *listed} if CONFIG in listed else set()
    return min((path.name for path in folder.iterdir() if path.name not in own), default=None)


def is_export_of(folder: Path, checkpoint: Path) -> bool:
    """Whether a folder holds the undamaged export of this checkpoint, alone or with other files."""
    try:
        for name, expected in read_manifest(folder).items():
            check_file(folder / name, expected)
    except (BrokenFolderError, OSError):
        return False
    source = (folder / _SOURCE).read_text() if (folder / _SOURCE).is_file() else ""
    return source == _source(checkpoint)


def _write(folder: Path, checkpoint: Path, origin: Path | None) -> None:
    from safetensors.torch import save_file

    outline = {n: entry for n, entry in read_outline(checkpoint).items() if n.startswith(MODEL)}
    files = _split_into_files(outline)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file_name = _file_name(number, len(files))
        tensors = {n: torch.empty(outline[n][0], dtype=outline[n][1]) for n in names}
        read_on_this_rank(checkpoint, tensors)
        weights = {n.removeprefix(MODEL): tensor for n, tensor in tensors.items()}
        save_file(weights, folder / file_name, {"format": "pt"})  # transformers requires the entry
        weight_map |= dict.fromkeys(weights, file_name)
    if len(files) > 1:
        total = sum(_nbytes(entry) for entry in outline.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    shutil.copyfile(checkpoint / CONFIG, folder / CONFIG)
    (folder / _SOURCE).write_text(_source(checkpoint))
    if origin is not None:
        for pattern in _COPIED:
            for path in filter(Path.is_file, origin.glob(pattern)):
                shutil.copyfile(path, folder / path.name)
        copy_code(origin, folder, json.loads((folder / CONFIG).read_text()).get("auto_map") or {})


def _split_into_files(outline: Outline) -> list[list[str]]:
    """Names of the tensors of each file."""
    files: list[list[str]] = [[]]
    size = 0
    for name in sorted(outline):
        if files[-1] and size + _nbytes(outline[name]) > _FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += _nbytes(outline[name])
    return files


def _nbytes(entry: tuple[tuple[int, ...], torch.dtype]) -> int:
    shape, dtype = entry
    return math.prod(shape) * dtype.itemsize


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _source(checkpoint: Path) -> str:
    """A description of the exported checkpoint, equal exactly for equal contents."""
    digest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    return json.dumps({"step": read_state(checkpoint).step, "manifest": digest}, indent=2) + "\n"
