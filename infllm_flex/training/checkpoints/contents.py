"""What a checkpoint holds, and its way to the disk and back."""

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
from infllm_flex.training.checkpoints.shards import Outline, outline, read_shards, write_shards
from infllm_flex.training.collectives import gather, num_ranks, rank

STATE = "state.json"
CONFIG = "config.json"
MODEL = "model."
_OPTIMIZER = "optimizer."
_RANDOM = "random."
_FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a process has in hand to save.

    Attributes:
        step: Steps done.
        text: Identity of the text that is trained on.
        weights: By name, each tied weight once.
        optimizer: Named tensors of `Optimizers.tensors`; empty between two stages.
        random_state: State of this process's generators by device.
        config_json: Text of the model's ``config.json``.
    """

    step: int
    text: str
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random_state: dict[str, Tensor]
    config_json: str


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint says of itself.

    Attributes:
        step: Steps done.
        text: Identity of the text that was trained on.
        processes: How many wrote it.
    """

    step: int
    text: str
    processes: int


def write(folder: Path, checkpoint: Checkpoint) -> list[str]:
    """Put this process's share of a checkpoint into a folder.

    Returns:
        Names of the files it wrote.
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
        "text": checkpoint.text,
        "processes": num_ranks(),
    }
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")
    (folder / CONFIG).write_text(checkpoint.config_json)
    return [*names, STATE, CONFIG]


def read_state(folder: Path) -> SavedState:
    """What a checkpoint that `newest` found says of itself.

    Raises:
        CheckpointError: It was written in a format that this version does not read.
    """
    state = json.loads((folder / STATE).read_text())
    found = state.get("format")
    if found != _FORMAT:
        by = f"format {found}, written by infllm_flex {state.get('infllm_flex', 'of old')}"
        newer = isinstance(found, int) and found > _FORMAT
        advice = "upgrade infllm_flex" if newer else "resume it with the version that wrote it"
        raise CheckpointError(
            f"{folder}: {by}; this version, {__version__}, reads {_FORMAT}: {advice}"
        )
    return SavedState(state["step"], state["text"], state["processes"])


def load(
    folder: Path,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    random_state: dict[str, Tensor],
) -> bool:
    """Fill tensors from a checkpoint that `newest` found. Every process must call it.

    Args:
        folder: The checkpoint.
        weights: As in `Checkpoint`, on this number of processes.
        optimizer: As in `Checkpoint`; empty to leave it out.
        random_state: As in `Checkpoint`.

    Returns:
        Whether there was a random state of this process. There is none where fewer processes, or
        other devices, wrote the checkpoint.

    Raises:
        CheckpointError: It is of another model or optimizer.
    """
    wanted = _named(weights, optimizer, random_state, process=rank())
    found = outline(folder)
    _refuse_others(folder, wanted, found, whole=bool(optimizer))
    known = all(name in found for name in _named({}, {}, random_state, process=rank()))
    if not known:
        wanted = _named(weights, optimizer, {}, process=rank())
    read_shards(folder, {name: value.detach() for name, value in wanted.items()})
    return known


def _named(
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    random_state: dict[str, Tensor],
    process: int,
) -> dict[str, Tensor]:
    named = {f"{MODEL}{name}": value for name, value in weights.items()}
    named |= {f"{_OPTIMIZER}{name}": value for name, value in optimizer.items()}
    return named | {f"{_RANDOM}{process}.{name}": v for name, v in random_state.items()}


def _refuse_others(folder: Path, wanted: dict[str, Tensor], found: Outline, whole: bool) -> None:
    """Nothing of the model, nor of the optimizer where it is asked for, may be left over."""
    asked = {name for names in gather(json.dumps(list(wanted))) for name in json.loads(names)}
    for name in sorted(found.keys() - asked):
        if part := re.search(r"\.part\d+of(\d+)\.", name):
            if whole:
                raise CheckpointError(
                    f"{folder}: 8-bit optimizer state of {part[1]} processes: "
                    f"resume with {part[1]} processes"
                )
        elif name.startswith(MODEL) or (whole and name.startswith(_OPTIMIZER)):
            raise CheckpointError(
                f"{folder}: it has {name}, which is not here; it is of another model or optimizer"
            )
