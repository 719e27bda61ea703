"""Parts of a comparison: what is done is kept, and processes that share a folder never collide."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infllm_flex.strict_yaml import ConfigError, Mistake


class SkippedError(Exception):
    """A part cannot be done here; the message says why."""


@dataclass(frozen=True)
class Part:
    """One unit of work: all of it is done, or nothing.

    Attributes:
        name: Words with colons between them, as ``train:dense:0``.
        needs: Names of the parts that come before.
        settings: What its result depends on, as JSON has it.
    """

    name: str
    needs: tuple[str, ...]
    settings: Mapping[str, Any]


class Folder:
    """The folder of a comparison.

    Args:
        path: Made when the first part begins.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, parts: list[Part]) -> None:
        """Refuse a folder whose parts were begun with other settings. Changes nothing.

        Raises:
            ConfigError: With the part and what differs.
        """
        if self.path.exists() and not self.path.is_dir():
            self._refuse(f"{self.path} is a file, expected a folder for the comparison")
        if self.path.is_dir() and not self._parts.is_dir() and any(self.path.iterdir()):
            self._refuse(f"{self.path} holds something else: choose another folder")
        for part in parts:
            begun = self._read(part, "settings")
            if begun is not None and begun != _as_json(part.settings):
                now = _as_json(part.settings)
                names = [name for name in now if begun.get(name) != now[name]]
                self._refuse(
                    f"{self.path} holds {part.name} with another {', '.join(names)}: give the "
                    "settings it was made with, or choose another folder"
                )

    def result(self, part: Part) -> dict[str, Any] | None:
        """What a part has found, None where it is not done."""
        return self._read(part, "result")

    @contextlib.contextmanager
    def claim(self, part: Part, wait: bool = False) -> Iterator[bool]:
        """Keep a part to this process for the block.

        Args:
            part: The part.
            wait: Whether to wait while another process has it.

        Yields:
            False where another process has it.
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
        """Note the settings of a part, before it is worked on."""
        self._write(part, "settings", _as_json(part.settings))

    def finish(self, part: Part, result: dict[str, Any]) -> None:
        """Keep the result of a part."""
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


def _as_json(settings: Mapping[str, Any]) -> Any:
    """As it reads back: tuples are lists, paths are text."""
    return json.loads(json.dumps(settings, default=str))
