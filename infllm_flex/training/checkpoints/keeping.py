"""The checkpoints of a folder: save a new one, find the newest undamaged one, delete old ones."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

from infllm_flex.training.atomic_folder import discard, publish_from_all_ranks, remove_leftovers
from infllm_flex.training.checkpoints.contents import Checkpoint, write
from infllm_flex.training.checkpoints.errors import CheckpointError
from infllm_flex.training.collectives import all_gather_text, num_ranks, on_first_rank, rank
from infllm_flex.training.manifest import (
    MANIFEST,
    BrokenFolderError,
    check_file,
    check_names,
    read_manifest,
)

_NAME = re.compile(r"step-(\d{8})")


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint and delete all but the ``keep`` newest. All processes must call it.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: It could not be written; earlier checkpoints are unchanged.
        RankError: Another process could not write.
        FileExistsError: A folder of that name exists and is no checkpoint.
    """
    target = path_of(folder, checkpoint.step)
    on_first_rank(lambda: _remove_existing(target))
    try:
        publish_from_all_ranks(target, lambda temporary: write(temporary, checkpoint))
    except OSError as error:
        raise OSError(
            f"{target} was not written: {error.strerror or error}; earlier checkpoints in {folder} "
            "are kept: make room there, then add --resume"
        ) from error
    damage = _find_damage(target)
    if damage:
        raise OSError(f"{target} was written but does not read back the same: {damage}")
    on_first_rank(lambda: _delete_old(folder, keep))
    return target


def clear(folder: Path) -> None:
    """Remove incomplete checkpoints after a crash. Only the run that writes there may call it."""
    if folder.is_dir():
        on_first_rank(lambda: remove_leftovers(folder, _NAME.pattern))


def last_step(folder: Path) -> int:
    """The step of the newest checkpoint, damaged or not; -1 if there is none."""
    return max(_steps(folder), default=-1)


def discard_first(folder: Path) -> None:
    """Remove the checkpoint of step 0, written by a run that stopped before its first step."""
    first = path_of(folder, 0)
    if _is_checkpoint(first):
        discard(first)


def path_of(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of ``step``, whether it exists or not."""
    return folder / f"step-{step:08d}"


def newest(folder: Path) -> Path | None:
    """The newest undamaged checkpoint, compared with its checksums; None if there are none.

    Damaged ones are skipped with a warning. All processes must call it; each reads some files.

    Raises:
        CheckpointError: All checkpoints are damaged.
    """
    reasons = []
    # The first process's view of the folder counts.
    for step in reversed(json.loads(all_gather_text(json.dumps(sorted(_steps(folder))))[0])):
        path = path_of(folder, step)
        if damage := _find_damage(path):
            reasons.append(f"{path}: {damage}")
            continue
        for reason in reasons if rank() == 0 else []:
            warnings.warn(f"skipped a damaged checkpoint: {reason}", stacklevel=2)
        return path
    if reasons:
        raise CheckpointError("every checkpoint is damaged:\n" + "\n".join(reasons))
    return None


def _find_damage(path: Path) -> str:
    """Say how a checkpoint is damaged, empty if it is not. All processes must call it."""
    own_damage = ""
    try:
        listed = read_manifest(path)
        check_names(path, listed)
        for name in sorted(listed)[rank() :: num_ranks()]:
            check_file(path / name, listed[name])
    except (BrokenFolderError, OSError) as error:
        own_damage = str(error)
    return next((damage for damage in all_gather_text(own_damage) if damage), "")


def _remove_existing(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        # This run saved it before it was resumed from an earlier checkpoint.
        if not _is_checkpoint(target):
            raise FileExistsError(f"{target} exists and is no checkpoint: move it away")
        discard(target)


def _delete_old(folder: Path, keep: int) -> None:
    paths = [path_of(folder, step) for step in sorted(_steps(folder))]
    for path in list(filter(_is_checkpoint, paths))[:-keep]:
        discard(path)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return [int(match[1]) for match in matches if match]


def _is_checkpoint(path: Path) -> bool:
    return not path.is_symlink() and (path / MANIFEST).is_file()
