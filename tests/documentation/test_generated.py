"""docs/api.md, docs/settings.md and docs/private-apis.md are what scripts/make_docs.py writes."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import infllm_flex
import infllm_flex_ops
from generated_docs.api import api_page
from generated_docs.docstrings import describe, items
from generated_docs.signatures import signature_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "make_docs.py"


def test_the_pages_are_up_to_date():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], text=True, capture_output=True, env=_env()
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run: python scripts/make_docs.py"


def _env():
    paths = [ROOT, ROOT / "custom_ops", ROOT / "scripts"]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def test_the_api_page_has_every_public_name_and_every_operator():
    headings = [line.lstrip("# ").strip("`") for line in api_page().splitlines() if "# `" in line]
    assert set(infllm_flex.__all__) | set(infllm_flex_ops.__all__) <= set(headings)


def attend(query, *rows: int, scale: float | None = None, mode: str = "all", **rest: str) -> bytes:
    """Attend to ``query``.

    More of it.

    Args:
        query: ``[B, S]``, a tensor whose
            description has two lines.
        rows: Some rows; such as: these.

    Returns:
        A result.

    Source: a paper, section 3.
    """
    raise NotImplementedError


def test_docstrings_become_paragraphs_and_lists():
    assert describe(inspect.getdoc(attend)) == [
        "Attend to `query`.",
        "More of it.",
        "*Arguments*",
        "- `query`: `[B, S]`, a tensor whose description has two lines.\n"
        "- `rows`: Some rows; such as: these.",
        "*Returns:* A result.",
        "*Source:* a paper, section 3.",
    ]


def test_signatures_stand_as_in_the_source_and_long_ones_take_a_line_for_each_argument():
    name = "module_with_a_long_name.attend"
    assert "\n" not in signature_of("attend", attend)
    assert signature_of(name, attend) == (
        f"{name}(\n    query,\n    *rows: int,\n    scale: float | None = None,\n"
        "    mode: str = 'all',\n    **rest: str,\n) -> bytes"
    )
    assert signature_of("short", test_docstrings_become_paragraphs_and_lists) == "short()"


@pytest.mark.parametrize("name", infllm_flex.__all__)
def test_every_argument_of_a_public_function_is_described(name):
    value = getattr(infllm_flex, name)
    if inspect.isclass(value) and issubclass(value, Exception):
        pytest.skip("an exception takes a message")
    docstring = inspect.getdoc(value) or ""
    described = items(docstring, "Args") | items(docstring, "Attributes")
    assert set(inspect.signature(value).parameters) <= set(described)
