#!/usr/bin/env python3
"""Write docs/api.md, docs/settings.md and docs/private-apis.md from the code.

scripts/make_docs.py            write the files
scripts/make_docs.py --check    exit with 1 if a file differs from what would be written
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from commands.standard_output import run_command
from generated_docs.api import api_page
from generated_docs.private_apis import private_apis_page
from generated_docs.settings import settings_page

DOCS = Path(__file__).parents[1] / "docs"
NOTICE = "<!-- Written by scripts/make_docs.py; do not edit. -->"


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    outdated = outdated_pages()
    for path, text in outdated.items():
        print(f"docs/{path.name}: {'out of date' if check else 'written'}")
        if not check:
            path.write_text(text)
    return 1 if check and outdated else 0


def outdated_pages() -> dict[Path, str]:
    """The text of every page that differs from its file, by path."""
    pages = {
        DOCS / "api.md": api_page(),
        DOCS / "settings.md": settings_page(),
        DOCS / "private-apis.md": private_apis_page(),
    }
    pages = {path: f"{NOTICE}\n\n{text}" for path, text in pages.items()}
    return {path: text for path, text in pages.items() if read(path) != text}


def read(path: Path) -> str | None:
    """The text of a file, or None if there is none."""
    return path.read_text() if path.exists() else None


if __name__ == "__main__":
    sys.exit(run_command(main))
