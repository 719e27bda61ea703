"""The contents of a checkpoint: write and read them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infllm_flex import __version__
from infllm_flex.training.checkpoints.errors import CheckpointError
from infllm_flex.training.checkpoints.shards import Outline, read_outline, read_shards, write_shards
from infllm_flex.training.collectives import all_gather_text, num_ranks, rank

STATE = "state.json"
CONFIG = "config.json"
MODEL = "model."
_OPTIMIZER = "optimizer."
_RANDOM = "random."
_FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state that a process saves.

    Attributes:
        step: Number of finished steps.
        text_identity: Identity of the training text.
        weights: Weights by name, each tied weight once.
        optimizer: The tensors of `Optimizers.tensors`; empty between two stages.
        random_state: State of this process's random generators by device.
        config_json: Text of the model's ``config.json``.
    """

    step: int
    text_identity: str
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random_state: dict[str, Tensor]
    config_json: str


@dataclass(frozen=True)
class SavedState:
    """The metadata of a checkpoint.

    Attributes:
        step: Number of finished steps.
        text_identity: Identity of the training text.
        processes: Number of processes that wrote it.
    """

    step: int
    text_identity: str
    processes: int


def write(folder: Path, checkpoint: Checkpoint) -> list[str]:
    """Write this process's shards of a checkpoint into a folder.

    Returns:
        Names of the written files.
    """
    tensors = _named(
        checkpoint.weights, checkpoint.optimizer, checkpoint.random_state, process=rank()
    )
    names = write_shards(folder, {name: t.detach().contiguous() for name, t in tensors.items()})
    if rank() != 0:
        return names
    state: dict[str, Any] = {
        "format": _FORMAT,
        "infllm_flex": __version__,
        "torch": torch.__version__,
        "step": checkpoint.step,
        "text": checkpoint.text_identity,
        "processes": num_ranks(),
    }
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")
    (folder / CONFIG).write_text(checkpoint.config_json)
    return [*names, STATE, CONFIG]


def read_state(folder: Path) -> SavedState:
    """Read the metadata of a checkpoint that `newest` returned.

    Raises:
        CheckpointError: This version does not read its format.
    """
    state = json.loads((folder / STATE).read_text())
    found = state.get("format")
    if found != _FORMAT:
        writer = f"infllm_flex {state.get('infllm_flex', 'of an unknown version')}"
        newer = isinstance(found, int) and found > _FORMAT
        advice = "upgrade infllm_flex" if newer else "resume it with the version that wrote it"
        raise CheckpointError(
            f"{folder}: format {found}, written by {writer}; this version, {__version__}, reads "
            f"format {_FORMAT}: {advice}"
        )
    return SavedState(state["step"], state["text"], state["processes"])


def load(
    folder: Path,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    random_state: dict[str, Tensor],
) -> bool:
    """Read a checkpoint that `newest` returned into tensors. All processes must call it.

    Args:
        folder: The checkpoint.
        weights: As in `Checkpoint`, sharded for the current number of processes.
        optimizer: As in `Checkpoint`; empty to skip the optimizer state.
        random_state: As in `Checkpoint`.

    Returns:
        Whether the checkpoint holds a random state for this process. It holds none if fewer
        processes, or other devices, wrote it.

    Raises:
        CheckpointError: It belongs to another model or optimizer.
    """
    wanted = _named(weights, optimizer, random_state, process=rank())
    found = read_outline(folder)
    _check_nothing_is_left(folder, wanted, found, with_optimizer=bool(optimizer))
    has_random_state = all(name in found for name in _named({}, {}, random_state, process=rank()))
    if not has_random_state:
        wanted = _named(weights, optimizer, {}, process=rank())
    read_shards(folder, {name: value.detach() for name, value in wanted.items()})
    return has_random_state


def _named(
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    random_state: dict[str, Tensor],
    process: int,
) -> dict[str, Tensor]:
    named = {f"{MODEL}{name}": value for name, value in weights.items()}
    named |= {f"{_OPTIMIZER}{name}": value for name, value in optimizer.items()}
    return named | {f"{_RANDOM}{process}.{name}": v for name, v in random_state.items()}


def _check_nothing_is_left(
    folder: Path, wanted: dict[str, Tensor], found: Outline, with_optimizer: bool
) -> None:
    """Refuse a checkpoint with model or optimizer tensors that no process asks for."""
    asked = {
        name for names in all_gather_text(json.dumps(list(wanted))) for name in json.loads(names)
    }
    for name in sorted(found.keys() - asked):
        if part := re.search(r"\.part\d+of(\d+)\.", name):
            if with_optimizer:
                raise CheckpointError(
                    f"{folder}: 8-bit optimizer state of {part[1]} processes: "
                    f"resume with {part[1]} processes"
                )
        elif name.startswith(MODEL) or (with_optimizer and name.startswith(_OPTIMIZER)):
            raise CheckpointError(
                f"{folder} has {name}, which this run does not have: the checkpoint belongs to "
                "another model or optimizer"
            )
