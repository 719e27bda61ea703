"""docs/api.md, docs/settings.md and docs/private-apis.md are what scripts/make_docs.py writes."""

from __future__ import annotations

import inspect

import pytest

import infllm_flex
import infllm_flex_ops
import make_docs
from generated_docs.api import api_page
from generated_docs.docstrings import describe, items
from generated_docs.signatures import signature_of


def test_the_pages_are_up_to_date():
    outdated = [path.name for path in make_docs.outdated_pages()]
    assert not outdated, "to write them: python scripts/make_docs.py"


def test_the_command_writes_what_is_missing_or_changed_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_docs, "DOCS", tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["make_docs.py", *arguments])
        return make_docs.main(), sorted(path.name for path in tmp_path.iterdir())

    pages = ["api.md", "private-apis.md", "settings.md"]
    assert run("--check") == (1, [])
    assert run() == (0, pages)
    assert run("--check") == (0, pages)
    (tmp_path / "api.md").write_text("other")
    capsys.readouterr()
    assert run("--check") == (1, pages)
    assert capsys.readouterr().out == "docs/api.md: out of date\n"
    assert (tmp_path / "api.md").read_text() == "other"


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
