"""Docstrings in Google's style as Markdown."""

from __future__ import annotations

import inspect
import re
import textwrap

_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Source):[ ]*(.*)$")
_ITEM = re.compile(r"^    (\w[\w, .]*): (.*)$")
_HEADINGS = {"Args": "Arguments", "Attributes": "Attributes", "Raises": "Raises"}


def describe(docstring: str) -> list[str]:
    """A docstring in Google's style as Markdown."""
    parts = []
    for section, text in split_sections(docstring).items():
        if section in _HEADINGS:
            entries = items(docstring, section).items()
            lines = [_fill(f"- `{name}`: {meaning}", indent="  ") for name, meaning in entries]
            parts += [f"*{_HEADINGS[section]}*", "\n".join(lines)]
        elif section:
            parts += paragraphs(f"*{section}:* {inspect.cleandoc(text)}")
        else:
            parts += paragraphs(text)
    return parts


def split_sections(docstring: str) -> dict[str, str]:
    """Return the sections of a docstring by name; the text before them has an empty name."""
    sections: dict[str, list[str]] = {"": []}
    name = ""
    for line in docstring.splitlines():
        if match := _SECTION.match(line):
            name = match[1]
            sections[name] = [match[2]] if match[2] else []
        else:
            sections[name].append(line)
    return {name: "\n".join(lines).strip("\n") for name, lines in sections.items()}


def items(docstring: str, section: str) -> dict[str, str]:
    """Return the entries of a section such as ``Args`` by name, each on one line."""
    found: dict[str, str] = {}
    name = ""
    for line in split_sections(docstring).get(section, "").splitlines():
        if match := _ITEM.match(line):
            name, found[match[1]] = match[1], match[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return {name: _inline(text) for name, text in found.items()}


def paragraphs(text: str) -> list[str]:
    """Write text as Markdown paragraphs of at most 120 columns."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(text))
    return [_fill(_inline(block)) for block in blocks if block.strip()]


def _fill(text: str, indent: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()),
        width=120,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _inline(text: str) -> str:
    return text.replace("``", "`")


def code_block(text: str) -> str:
    """Fence Python code that is shown and not run."""
    return f"```py\n{text}\n```"
