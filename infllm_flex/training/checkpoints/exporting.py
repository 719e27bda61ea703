"""A checkpoint as a model folder that transformers reads, whatever number of processes wrote it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import torch

from infllm_flex.minicpm.code_files import copy_code
from infllm_flex.training.atomic_folder import clear_leftovers, publish
from infllm_flex.training.checkpoints.contents import CONFIG, MODEL, read_state
from infllm_flex.training.checkpoints.errors import CheckpointError
from infllm_flex.training.checkpoints.keeping import newest
from infllm_flex.training.checkpoints.shards import Outline, fill_alone, outline
from infllm_flex.training.manifest import (
    MANIFEST,
    BrokenFolderError,
    read_manifest,
    verify,
)

_INDEX = "model.safetensors.index.json"
_SOURCE = "checkpoint.json"
_FILE_BYTES = 5 * 10**9
# What else belongs to a model: its tokenizer and how it generates.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


def export(checkpoint: Path, target: Path, origin: Path | None = None) -> Path:
    """Write the weights of a checkpoint whole, a few gigabytes at a time, by this process alone.

    Args:
        checkpoint: One that `newest` found.
        target: The model folder. One that was made here before is replaced, any other is not.
        origin: The model folder that training began with; its tokenizer is copied along, and the
            code that the model's ``auto_map`` names.

    Returns:
        ``target``.

    Raises:
        FileExistsError: ``target`` is something else.
        CheckpointError: The checkpoint is of another format.
        OSError: The disk is full or not writable; nothing has changed.
    """
    read_state(checkpoint)
    if target.exists() and not is_exported(target):
        raise FileExistsError(f"{target} holds something else: choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(target.parent, re.escape(target.name))
    publish(target, lambda aside: _write(aside, checkpoint, origin), replace=True)
    return target


def export_newest(folder: Path, target: Path, origin: Path | None = None) -> Path:
    """`export` the newest whole checkpoint of a folder, also beside a training that goes on.

    Raises:
        CheckpointError: There is none.
    """
    checkpoint = newest(folder)
    if checkpoint is None:
        raise CheckpointError(f"{folder}: there is no checkpoint to export")
    return export(checkpoint, target, origin)


def is_exported(folder: Path) -> bool:
    """Whether a folder is a model that `export` wrote, damaged or not."""
    try:
        return CONFIG in read_manifest(folder)
    except BrokenFolderError:
        return False


def is_export_of(folder: Path, checkpoint: Path) -> bool:
    """Whether a folder is the whole export of a checkpoint."""
    try:
        verify(folder)
    except (BrokenFolderError, OSError):
        return False
    source = (folder / _SOURCE).read_text() if (folder / _SOURCE).is_file() else ""
    return source == _source(checkpoint)


def _write(aside: Path, checkpoint: Path, origin: Path | None) -> None:
    from safetensors.torch import save_file

    found = {n: entry for n, entry in outline(checkpoint).items() if n.startswith(MODEL)}
    files = _split(found)
    places: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        name = _file_name(number, len(files))
        tensors = {n: torch.empty(found[n][0], dtype=found[n][1]) for n in names}
        fill_alone(checkpoint, tensors)
        plain = {n.removeprefix(MODEL): tensor for n, tensor in tensors.items()}
        save_file(plain, aside / name, {"format": "pt"})  # transformers asks for it
        places |= dict.fromkeys(plain, name)
    if len(files) > 1:
        total = sum(_nbytes(entry) for entry in found.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (aside / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    shutil.copyfile(checkpoint / CONFIG, aside / CONFIG)
    (aside / _SOURCE).write_text(_source(checkpoint))
    if origin is not None:
        for path in _companions(origin):
            shutil.copyfile(path, aside / path.name)
        copy_code(origin, aside, json.loads((aside / CONFIG).read_text()).get("auto_map") or {})


def _companions(origin: Path) -> list[Path]:
    return [path for pattern in _COMPANIONS for path in origin.glob(pattern) if path.is_file()]


def _split(found: Outline) -> list[list[str]]:
    """Names of the tensors of each file."""
    files: list[list[str]] = [[]]
    size = 0
    for name in sorted(found):
        if files[-1] and size + _nbytes(found[name]) > _FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += _nbytes(found[name])
    return files


def _nbytes(entry: tuple[tuple[int, ...], torch.dtype]) -> int:
    shape, dtype = entry
    return math.prod(shape) * dtype.itemsize


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _source(checkpoint: Path) -> str:
    """Which checkpoint this is of: equal exactly for equal content."""
    digest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    return json.dumps({"step": read_state(checkpoint).step, "manifest": digest}, indent=2) + "\n"
