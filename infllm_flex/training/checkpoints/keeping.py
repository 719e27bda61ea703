"""Which checkpoints a folder has, which of them is the newest whole one, and which to drop."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

from infllm_flex.training.atomic_folder import clear_leftovers, discard, publish_together
from infllm_flex.training.checkpoints.contents import Checkpoint, write
from infllm_flex.training.checkpoints.errors import CheckpointError
from infllm_flex.training.collectives import gather, num_ranks, on_first, rank
from infllm_flex.training.manifest import (
    MANIFEST,
    BrokenFolderError,
    check_file,
    check_names,
    read_manifest,
)

_NAME = re.compile(r"step-(\d{8})")


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint and drop old ones, keeping the ``keep`` newest. All processes must call.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: It could not be written; the earlier ones are as they were.
        RankError: Another process could not write.
        FileExistsError: A folder of that name is there that is no checkpoint.
    """
    target = path_of(folder, checkpoint.step)
    on_first(lambda: _make_way(target))
    publish_together(target, lambda aside: write(aside, checkpoint))
    problem = _problem(target)
    if problem:
        raise OSError(f"{target} was written but does not read back the same: {problem}")
    on_first(lambda: _retire(folder, keep))
    return target


def clear(folder: Path) -> None:
    """Remove what a crash left of a checkpoint. For the run that writes there, and no other."""
    if folder.is_dir():
        on_first(lambda: clear_leftovers(folder, _NAME.pattern))


def last_step(folder: Path) -> int:
    """The step of the newest checkpoint, damaged or not; -1 where there is none."""
    return max(_steps(folder), default=-1)


def discard_start(folder: Path) -> None:
    """Remove the checkpoint of step 0, which a run leaves that is stopped before its first step."""
    start = path_of(folder, 0)
    if _is_ours(start):
        discard(start)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is, or would be."""
    return folder / f"step-{step:08d}"


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose every bit is as it was written; None where there are none.

    Damaged ones are skipped with a warning. All processes must call it; they share the reading.

    Raises:
        CheckpointError: There are checkpoints, all of them damaged.
    """
    reasons = []
    # The first process's view of the folder counts.
    for step in reversed(json.loads(gather(json.dumps(sorted(_steps(folder))))[0])):
        path = path_of(folder, step)
        if reason := _problem(path):
            reasons.append(f"{path}: {reason}")
            continue
        for reason in reasons if rank() == 0 else []:
            warnings.warn(f"skipped a damaged checkpoint: {reason}", stacklevel=2)
        return path
    if reasons:
        raise CheckpointError("no checkpoint can be used:\n" + "\n".join(reasons))
    return None


def _problem(path: Path) -> str:
    """Why a checkpoint cannot be used, found by all processes together; empty if it can."""
    mine = ""
    try:
        listed = read_manifest(path)
        check_names(path, listed)
        for name in sorted(listed)[rank() :: num_ranks()]:
            check_file(path / name, listed[name])
    except (BrokenFolderError, OSError) as error:
        mine = str(error)
    return next((reason for reason in gather(mine) if reason), "")


def _make_way(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        # Saved before by this run, which was then resumed from an earlier checkpoint.
        if not _is_ours(target):
            raise FileExistsError(f"{target} is no checkpoint; it is left as it is")
        discard(target)


def _retire(folder: Path, keep: int) -> None:
    ours = [path for step in sorted(_steps(folder)) if _is_ours(path := path_of(folder, step))]
    for path in ours[:-keep]:
        discard(path)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return [int(match[1]) for match in matches if match]


def _is_ours(path: Path) -> bool:
    return not path.is_symlink() and (path / MANIFEST).is_file()
