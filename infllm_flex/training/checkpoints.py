"""Checkpoints that survive a crash at any moment: safetensors and JSON, no pickle anywhere.

``step-00001234/`` holds ``model.safetensors`` and ``config.json``, so that it is also a model
folder for transformers, ``optimizer.safetensors`` and ``state.json``, and a manifest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infllm_flex.training.manifest import MANIFEST, BrokenFolderError, publish, verify

_NAME = re.compile(r"step-(\d{8})")
_LEFTOVER = re.compile(r"\.(tmp|trash)-step-\d{8}-[0-9a-f]{32}")
_FORMAT = 1


class CheckpointError(ValueError):
    """There are checkpoints, but none that can be used."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        step: Steps done.
        weights: By name, each tied weight once.
        optimizer: Named tensors of `Optimizers.tensors`; empty between two stages.
        config_json: Text of the model's ``config.json``.
        random_state: State of PyTorch's generators by device.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    config_json: str
    random_state: dict[str, Tensor]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint and drop old ones, keeping the ``keep`` newest.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: It could not be written; the earlier ones are as they were.
        FileExistsError: A folder of that name is there that is no checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(folder)
    target = path_of(folder, checkpoint.step)
    if target.exists():
        # Saved before by this run, which was then resumed from an earlier checkpoint.
        if not _is_ours(target):
            raise FileExistsError(f"{target} is no checkpoint; it is left as it is")
        _discard(target)
    publish(target, lambda aside: _write(aside, checkpoint))
    verify(target)
    ours = [path for step in sorted(_steps(folder)) if _is_ours(path := path_of(folder, step))]
    for path in ours[:-keep]:
        _discard(path)
    return target


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is, or would be."""
    return folder / f"step-{step:08d}"


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose every bit is as it was written; None where there are none.

    Damaged ones are skipped with a warning.

    Raises:
        CheckpointError: There are checkpoints, all of them damaged.
    """
    reasons = []
    for step in sorted(_steps(folder), reverse=True):
        path = path_of(folder, step)
        try:
            verify(path)
        except BrokenFolderError as error:
            reasons.append(f"{path}: {error}")
            continue
        for reason in reasons:
            warnings.warn(f"skipped a damaged checkpoint: {reason}", stacklevel=2)
        return path
    if reasons:
        raise CheckpointError("no checkpoint can be used:\n" + "\n".join(reasons))
    return None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint that `newest` found.

    Raises:
        CheckpointError: It was written in a format this version does not know.
    """
    from safetensors.torch import load_file

    state = json.loads((path / "state.json").read_text())
    if state.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: format {state.get('format')} is not {_FORMAT}, the one this version reads"
        )
    tensors = load_file(path / "optimizer.safetensors")
    return Checkpoint(
        step=state["step"],
        weights=load_file(path / "model.safetensors"),
        optimizer=_under("optimizer.", tensors),
        config_json=(path / "config.json").read_text(),
        random_state=_under("random.", tensors),
    )


def _write(aside: Path, checkpoint: Checkpoint) -> None:
    from safetensors.torch import save_file

    metadata = {"format": "pt"}  # transformers asks for it
    save_file(_own(checkpoint.weights), aside / "model.safetensors", metadata)
    tensors = {f"optimizer.{name}": value for name, value in checkpoint.optimizer.items()}
    tensors |= {f"random.{name}": value for name, value in checkpoint.random_state.items()}
    save_file(_own(tensors), aside / "optimizer.safetensors", metadata)
    (aside / "config.json").write_text(checkpoint.config_json)
    state: dict[str, Any] = {
        "format": _FORMAT,
        "step": checkpoint.step,
        "torch": torch.__version__,
    }
    (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return [int(match[1]) for match in matches if match]


def _is_ours(path: Path) -> bool:
    return not path.is_symlink() and (path / MANIFEST).is_file()


def _discard(path: Path) -> None:
    # Renamed first, so that half a checkpoint never bears the name of a whole one.
    trash = path.parent / f".trash-{path.name}-{uuid.uuid4().hex}"
    os.rename(path, trash)
    shutil.rmtree(trash)


def _clear_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
