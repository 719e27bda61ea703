"""The documentation points to files, headings and commands that exist; tables of contents fit."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for folder in ("docs", "examples") for page in (ROOT / folder).rglob("*.md")),
    ]
)
_CODE = re.compile(r"^```.*?^```", re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.M)
# Folders that code on a page begins with, and where they lie.
_PATH = re.compile(
    r"(?<![\w/.-])(?:scripts|configs|docs|tests|examples|custom_ops|infllm_flex|\.ci"
    r"|infllm_flex_ops|patch|engines|training)/[\w./-]*\w"
)
_ABOVE = (ROOT, ROOT / "custom_ops", ROOT / "infllm_flex")


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have on a code host: lower case, words joined by ``-``."""
    headings = _HEADING.findall(_CODE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    return _LINK.findall(_CODE.sub("", page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


# The changelog names files as they were.
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "CHANGELOG.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_paths_in_code_exist(page: Path) -> None:
    """Paths of this repository in code blocks and in code within a sentence are those of files."""
    text = page.read_text()
    code = "\n".join([*_CODE.findall(text), *re.findall(r"`([^`\n]+)`", _CODE.sub("", text))])
    paths = {path for path in _PATH.findall(code) if "NAME" not in path}
    missing = {path for path in paths if not any((above / path).exists() for above in _ABOVE)}
    assert not missing


def test_no_page_holds_the_marks_of_a_merge() -> None:
    marks = re.compile(r"^\s*(<{7}|>{7}|={7}$)", re.M)
    assert not [page for page in PAGES if marks.search(page.read_text())]


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    pages = {
        str(page.relative_to(ROOT / "docs")) for page in PAGES if ROOT / "docs" in page.parents
    }
    assert {page for page in pages if f"({page})" not in index} == {"README.md"}


def test_the_contents_of_decisions_are_complete() -> None:
    page = ROOT / "docs/decisions.md"
    listed = [link.removeprefix("#") for link in links(page) if link.startswith("#")]
    titles = re.findall(r"^## (.+)$", page.read_text(), re.M)
    assert listed == [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]


def test_readme_has_two_screens() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 9000
    assert max(map(len, text.splitlines())) <= 120
