"""The folder of a run: which run owns it, and a lock against a second process."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from infllm_flex.strict_yaml import ConfigError, Mistake, build_dataclass, load_yaml, to_yaml
from infllm_flex.training import checkpoints
from infllm_flex.training.checkpoints.exporting import other_file
from infllm_flex.training.settings import DataSettings, TrainingSettings

SETTINGS = "run.yaml"
METRICS = "metrics.jsonl"
BOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
DATA = "data"
MODEL = "model"
_LOCK = ".lock"


def check_folder(settings: TrainingSettings, resume: bool) -> None:
    """Refuse a folder that holds another run or other files. Changes nothing on disk.

    The folder of a run that ended before its first step may be reused with any settings, with or
    without ``resume``.

    Raises:
        ConfigError: Says what the folder holds and what to do.
    """
    folder = settings.run.folder
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        _refuse(f"{folder} is a file, expected a folder for the run")
    content = {path.name for path in folder.iterdir()} - {_LOCK, _temporary_name(SETTINGS)}
    if not content:
        return
    if SETTINGS not in content:
        _refuse(f"{folder} holds other files ({sorted(content)[0]}): choose another folder")
    is_finished = checkpoints.last_step(folder / CHECKPOINTS) == settings.total_steps
    if not is_finished and (other := other_file(folder / MODEL)):
        _refuse(
            f"{folder / MODEL} holds other files ({other}): move them away, the model will be "
            "written there"
        )
    if not _has_steps(folder):
        return
    if not resume:
        _refuse(f"{folder} already holds a run: add --resume to continue, or choose another folder")
    differing = _differences(settings, folder / SETTINGS)
    if differing:
        _refuse(
            f"{folder} holds a run with different settings ({', '.join(differing)}): to resume it, "
            f"use the settings in {folder / SETTINGS}; for a new run, choose another folder"
        )


@contextlib.contextmanager
def claim_folder(settings: TrainingSettings, resume: bool) -> Iterator[Path]:
    """Create the folder, write the settings into it and lock it for the block.

    Raises:
        ConfigError: As `check_folder`, or another process uses the folder.
    """
    folder = settings.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _refuse(f"{folder} is in use by another process")
        check_folder(settings, resume)  # again: another run may have ended before the lock was held
        if not _has_steps(folder):
            checkpoints.discard_first(folder / CHECKPOINTS)
            header = "# The settings of this run, defaults included.\n"
            temporary = folder / _temporary_name(SETTINGS)
            temporary.write_text(header + to_yaml(settings))
            os.replace(temporary, folder / SETTINGS)
        yield folder


def _has_steps(folder: Path) -> bool:
    """Whether a run has left traces of a finished step here, damaged or not."""
    metrics = folder / METRICS
    has_metrics = metrics.exists() and metrics.stat().st_size > 0
    return (
        has_metrics or (folder / MODEL).exists() or checkpoints.last_step(folder / CHECKPOINTS) > 0
    )


def _temporary_name(name: str) -> str:
    return f"{name}.tmp"


def _differences(settings: TrainingSettings, path: Path) -> list[str]:
    saved = _reproducible_part(build_dataclass(TrainingSettings, load_yaml(path)))
    settings = _reproducible_part(settings)
    sections = ("model", "attention", "data", "stages", "optim")
    differing = [name for name in sections if getattr(settings, name) != getattr(saved, name)]
    if "stages" not in differing and list(settings.stages) != list(saved.stages):
        differing.append("the order of stages")
    if settings.run.seed != saved.run.seed:
        differing.append("run.seed")
    return differing


def _reproducible_part(settings: TrainingSettings) -> TrainingSettings:
    """The settings with defaults where a resumed run may differ without changing a sample."""
    defaults = DataSettings()
    data = replace(
        settings.data,
        workers=defaults.workers,
        cache=defaults.cache,
        damaged_percent=defaults.damaged_percent,
    )
    stages = {name: replace(s, sequences_at_once=0) for name, s in settings.stages.items()}
    return replace(settings, data=data, stages=stages)


def _refuse(problem: str) -> None:
    raise ConfigError([Mistake("", "run.folder", problem)])
