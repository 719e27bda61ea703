"""The text to train on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from infllm_flex.training.settings.bounds import check_range

STDLIB = "python_stdlib"


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The text, read as bytes, one token each.

    Attributes:
        source: ``python_stdlib`` for the sources of the Python that runs this, or a local folder
            or text file.
        pattern: Which files of a folder are text, its subfolders included.
        held_out_percent: Share of the files, chosen by a hash of their relative path, that is
            never trained on.
    """

    source: str = STDLIB
    pattern: str = "*.txt"
    held_out_percent: int = 10

    def __post_init__(self) -> None:
        check_range(self, "held_out_percent", 0, 90)
        if self.source != STDLIB and not Path(self.source).expanduser().exists():
            raise ValueError(
                f"source must be {STDLIB} or a local folder or file, got {self.source!r}"
            )
        if not self.pattern or "/" in self.pattern:
            raise ValueError(f"pattern must be a file name pattern, got {self.pattern!r}")
