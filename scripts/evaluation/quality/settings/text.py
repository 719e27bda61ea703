"""The text to train on, to predict, and to hide facts in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PYTHON = "python_packages"


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The text to train on, to predict, and to hide facts in.

    Attributes:
        source: ``python_packages``: the sources of the running Python and of its installed
            packages; or a local folder.
        pattern: Pattern of file names, in subfolders, too.
        characters: Largest number of characters to read, folder by folder in the order of a hash.
        held_out_percent: Percentage of the folders that is never trained on.
    """

    source: str = PYTHON
    pattern: str = "*.py"
    characters: int = 90_000_000
    held_out_percent: int = 5

    def __post_init__(self) -> None:
        if self.source != PYTHON and not Path(self.source).expanduser().is_dir():
            raise ValueError(f"source must be {PYTHON} or a local folder, got {self.source!r}")
        if not self.pattern or "/" in self.pattern:
            raise ValueError(f"pattern must be a file name pattern, got {self.pattern!r}")
        if self.characters < 1:
            raise ValueError(f"characters must be at least 1, got {self.characters}")
        if not 1 <= self.held_out_percent <= 50:
            raise ValueError(
                f"held_out_percent must be between 1 and 50, got {self.held_out_percent}"
            )
