"""The pages of the documentation, and what stands in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs/results/README.md",
]
NOT_RUN = re.compile(r"<!-- not run: .+ -->")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    line: int  # of the first line of its text
    is_run: bool  # no comment before it says why not

    def __str__(self) -> str:
        return f"{self.language} in line {self.line}"


def name_of(page: Path) -> str:
    """The path of a page, as pytest shows it."""
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of one language, in order."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    start = fence = before = None
    for number, line in enumerate(lines):
        if fence is None and line.startswith("```") and line.strip("`") != "":
            fence, start = line.strip("`"), number + 1
            before = next((x for x in reversed(lines[:number]) if x.strip()), "")
        elif fence is None and line.startswith("```"):
            fence, start, before = "none", number + 1, ""
        elif fence is not None and line == "```":
            text = "\n".join(lines[start:number])
            found.append(Block(fence, text, start + 1, not NOT_RUN.fullmatch(before)))
            fence = None
    assert fence is None, f"{name_of(page)}: the block of line {start} has no end"
    return [block for block in found if block.language == language]


def prose(page: Path) -> str:
    """The text of a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
