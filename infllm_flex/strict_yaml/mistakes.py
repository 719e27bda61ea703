"""The mistakes of a config file, collected into one error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One mistake in a config file.

    Attributes:
        where: ``file:line``, or the command-line override.
        key: Dotted path of the setting; empty for the file as a whole.
        problem: The expectation, and the value that came.
    """

    where: str
    key: str
    problem: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.problem) if part)


class ConfigError(ValueError):
    """A config that cannot be used. The message has one line per mistake.

    Attributes:
        mistakes: All mistakes, in the order of the file.
    """

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(str(mistake) for mistake in self.mistakes))
