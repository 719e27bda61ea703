"""Parts of a comparison, whose results are saved, and locks between processes of one folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infllm_flex.strict_yaml import ConfigError, Mistake


class SkippedError(Exception):
    """A part cannot be done on this machine; the message gives the reason."""


@dataclass(frozen=True)
class Part:
    """A unit of work, which is either done or not.

    Attributes:
        name: Words separated by colons, such as ``train:dense:0``.
        needs: Names of the parts that must be done before.
        settings: Everything that its result depends on, in JSON types.
    """

    name: str
    needs: tuple[str, ...]
    settings: Mapping[str, Any]


class Folder:
    """The folder of a comparison.

    Args:
        path: The folder; it is made when the first part begins.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, parts: list[Part]) -> None:
        """Check that no part in the folder was begun with other settings. Changes nothing.

        Raises:
            ConfigError: A part was; the message names it and the settings that differ.
        """
        if self.path.exists() and not self.path.is_dir():
            self._refuse(f"expected a folder for the comparison, {self.path} is a file")
        if self.path.is_dir() and not self._parts.is_dir() and any(self.path.iterdir()):
            self._refuse(f"{self.path} holds something else: choose another folder")
        for part in parts:
            begun = self._read(part, "settings")
            if begun is not None and begun != _as_json(part.settings):
                changes = _changes(_as_json(part.settings), begun)
                self._refuse(
                    f"{self.path} holds {part.name} with other settings ({', '.join(changes)}): "
                    "give the settings it was made with, or choose another folder"
                )

    def result(self, part: Part) -> dict[str, Any] | None:
        """Return the result of a part; None where it is not done."""
        return self._read(part, "result")

    @contextlib.contextmanager
    def claim(self, part: Part, wait: bool = False) -> Iterator[bool]:
        """Lock a part for this process inside the block.

        Args:
            part: The part.
            wait: Whether to wait while another process holds the lock.

        Yields:
            False where another process holds it.
        """
        self._parts.mkdir(parents=True, exist_ok=True)
        with self._file(part, "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def begin(self, part: Part) -> None:
        """Save the settings of a part before the work begins."""
        self._write(part, "settings", _as_json(part.settings))

    def finish(self, part: Part, result: dict[str, Any]) -> None:
        """Save the result of a part."""
        self._write(part, "result", result)

    @property
    def _parts(self) -> Path:
        return self.path / "parts"

    def _file(self, part: Part, kind: str) -> Path:
        return self._parts / f"{part.name.replace(':', '.').replace('->', '-on-')}.{kind}"

    def _read(self, part: Part, kind: str) -> Any:
        path = self._file(part, f"{kind}.json")
        return json.loads(path.read_text()) if path.is_file() else None

    def _write(self, part: Part, kind: str, value: Any) -> None:
        path = self._file(part, f"{kind}.json")
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(json.dumps(value))
        os.replace(aside, path)

    def _refuse(self, problem: str) -> None:
        raise ConfigError([Mistake("", "run.folder", problem)])


def _changes(now: Any, begun: Any, place: str = "") -> list[str]:
    """Describe the settings that differ, such as ``judge.items: 9, there 4``."""
    if not isinstance(now, dict) or not isinstance(begun, dict):
        shown = [textwrap.shorten(json.dumps(value), 60) for value in (now, begun)]
        return [f"{place}: {shown[0]}, there {shown[1]}"] if now != begun else []
    return [
        change
        for name in now | begun
        for change in _changes(now.get(name), begun.get(name), f"{place}.{name}".lstrip("."))
    ]


def _as_json(settings: Mapping[str, Any]) -> Any:
    """Convert to what JSON reads back: tuples become lists, paths become text."""
    return json.loads(json.dumps(settings, default=str))
