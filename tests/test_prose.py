"""Sentences begin with their subject, as CONTRIBUTING asks, not with "What", "So" or "Of"."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkout import ROOT

_INVERTED = re.compile(r"(?:^|(?<=[.:;] ))(?:What|So|Of) [a-z][^.?]*(?:\.|$)")
_CODE = [*ROOT.glob("*/**/*.py")]
_PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]


def _paragraphs(path: Path) -> Iterator[str]:
    """Docstrings paragraph by paragraph, and runs of comment lines; of a page its paragraphs."""
    text = path.read_text()
    if path.suffix == ".md":
        yield from (p for p in text.split("\n\n") if not p.lstrip().startswith(("#", "|", "```")))
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield from (ast.get_docstring(node) or "").split("\n\n")
    previous, words = -1, []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != previous + 1:
                yield " ".join(words)
                words = []
            previous = token.start[0]
            words.append(token.string.lstrip("# "))
    yield " ".join(words)


def _inverted(text: str) -> list[str]:
    return _INVERTED.findall(" ".join(text.split()))


@pytest.mark.parametrize("folder", ["infllm_flex", "custom_ops", "scripts", "examples", "tests"])
def test_no_docstring_or_comment_begins_with_its_object(folder):
    files = [path for path in _CODE if path.relative_to(ROOT).parts[0] == folder]
    found = {
        f"{path.relative_to(ROOT)}: {sentence}"
        for path in files
        if path != Path(__file__)
        for paragraph in _paragraphs(path)
        for sentence in _inverted(paragraph)
    }
    assert files
    assert not found


def test_no_sentence_of_a_page_begins_with_its_object():
    found = {
        f"{path.relative_to(ROOT)}: {sentence}"
        for path in _PAGES
        if path.name != "CONTRIBUTING.md"  # shows such sentences, to say what is wrong with them
        for paragraph in _paragraphs(path)
        for sentence in _inverted(paragraph)
    }
    assert not found


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("What a row reads is clamped.", 1),
        ("Rows are clamped. So no index\nleads out.", 1),
        ("What does a row read?", 0),
        ("A row reads what it sees.", 0),
    ],
)
def test_an_inverted_sentence_is_found(text, count):
    assert len(_inverted(text)) == count
