"""The folder of a run: whose it is, and that two runs never share one."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from infllm_flex.strict_yaml import ConfigError, Mistake, build_dataclass, load_yaml, to_yaml
from infllm_flex.training import checkpoints
from infllm_flex.training.checkpoints.exporting import is_exported
from infllm_flex.training.settings import DataSettings, TrainingSettings

SETTINGS = "run.yaml"
METRICS = "metrics.jsonl"
BOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
DATA = "data"
MODEL = "model"
_LOCK = ".lock"


def check_folder(settings: TrainingSettings, resume: bool) -> None:
    """Refuse a folder that holds another run or something else. Changes nothing.

    A run that ended before its first step holds nothing worth keeping: its folder may be used by
    any settings, with ``resume`` or without.

    Raises:
        ConfigError: With what the folder holds and what to do.
    """
    folder = settings.run.folder
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        _refuse(f"{folder} is a file, expected a folder for the run")
    content = {path.name for path in folder.iterdir()} - {_LOCK, _aside(SETTINGS)}
    if not content:
        return
    if SETTINGS not in content:
        _refuse(f"{folder} holds something else ({sorted(content)[0]}): choose another folder")
    if (folder / MODEL).exists() and not is_exported(folder / MODEL):
        _refuse(f"{folder / MODEL} holds something else: move it away, the model will go there")
    if not _has_steps(folder):
        return
    if not resume:
        _refuse(f"{folder} holds a run already: add --resume to go on, or choose another folder")
    differing = _differences(settings, folder / SETTINGS)
    if differing:
        _refuse(
            f"{folder} holds a run with another {', '.join(differing)}: to resume it, give the "
            f"settings in {folder / SETTINGS}; for a new run, choose another folder"
        )


@contextlib.contextmanager
def claim_folder(settings: TrainingSettings, resume: bool) -> Iterator[Path]:
    """Make the folder, note the settings in it and keep other processes out for the block.

    Raises:
        ConfigError: As `check_folder`; or another process uses the folder.
    """
    folder = settings.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _refuse(f"{folder} is in use by another process")
        check_folder(settings, resume)  # again: a run may have ended there since
        if not _has_steps(folder):
            checkpoints.discard_start(folder / CHECKPOINTS)
            header = "# The settings of this run, defaults included.\n"
            aside = folder / _aside(SETTINGS)
            aside.write_text(header + to_yaml(settings))
            os.replace(aside, folder / SETTINGS)
        yield folder


def _has_steps(folder: Path) -> bool:
    """Whether a run has done a step that left something here, damaged or not."""
    metrics = folder / METRICS
    noted = metrics.exists() and metrics.stat().st_size > 0
    return noted or (folder / MODEL).exists() or checkpoints.last_step(folder / CHECKPOINTS) > 0


def _aside(name: str) -> str:
    return f"{name}.tmp"


def _differences(settings: TrainingSettings, path: Path) -> list[str]:
    before = _what_counts(build_dataclass(TrainingSettings, load_yaml(path)))
    settings = _what_counts(settings)
    sections = ("model", "attention", "data", "stages", "optim")
    differing = [name for name in sections if getattr(settings, name) != getattr(before, name)]
    if settings.run.seed != before.run.seed:
        differing.append("run.seed")
    return differing


def _what_counts(settings: TrainingSettings) -> TrainingSettings:
    """Without what may differ from one start of a run to the next, as it changes no sample."""
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
