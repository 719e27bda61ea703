"""Every figure in README, and others that name their rows, follow from rows of docs/results."""

from __future__ import annotations

import csv
import functools
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.documentation.pages import PAGES, ROOT, name_of, prose

# The file, conditions on all rows, then a rule in each line. A rule may name another file of that
# folder (``file=``).
_COMMENT = re.compile(r"<!-- figures: (\S+)([^\n]*?)(?:\n(.*?))?-->", re.DOTALL)
_DECIMAL = re.compile(r"(?<![\w.])(?:(?<=\()-)?\d+\.\d+(?![\w.]*\d)")
_MEASURED = re.compile(r"(?<![\w.,-])\d+(?:\.\d+)?(?:x\b| ?(?:%|ms\b|µs\b|GB/s\b))")


_OURS = ("auto", "fused", "decode")


class Figures(NamedTuple):
    """The numbers of a paragraph or table, and where the comment below says they are from."""

    file: Path
    rules: list[str]  # a formula and a selection of rows each
    shown: list[str]


def figures(text: str) -> list[Figures]:
    found = []
    for match in _COMMENT.finditer(text):
        # Without the heads of rows.
        cells = re.sub(r"^\|[^|]*\|", "", _above(text, match), flags=re.MULTILINE)
        rules = [f"{rule} {match[2]}" for rule in (match[3] or "").strip().splitlines()]
        found.append(Figures(ROOT / match[1], rules, _DECIMAL.findall(cells)))
    return found


def _above(text: str, comment: re.Match[str]) -> str:
    """The paragraph or table that ends where a comment begins."""
    return re.split(r"\n\s*\n|-->\n", text[: comment.start()].rstrip("\n"))[-1]


@functools.cache
def expected(file: Path, rule: str) -> list[float]:
    """The values of a rule such as ``speed_up Hq=32 S=1024,2048``, in the order of its lists.

    Several formulas (``microseconds,speed_up``) give a value each for every row.
    """
    formulas, *pairs = rule.split()
    conditions = dict(pair.split("=", 1) for pair in pairs)
    rows = _rows(file.with_name(conditions.pop("file", file.name)))
    return [
        _FORMULAS[formula](rows, dict(zip(conditions, values, strict=True)))
        for values in itertools.product(*(choice.split(",") for choice in conditions.values()))
        for formula in formulas.split(",")
    ]


@functools.cache
def _rows(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


class Medians(NamedTuple):
    """Times of one run, in milliseconds."""

    ours: float
    dense: float  # the fastest dense attention


def medians(rows: list[dict[str, str]], wanted: dict[str, str]) -> Medians:
    """Medians of the first run that has ours and dense attention.

    Without ``settings``, ours has those of ``attention:``. ``variant=decode_paged`` is ours over
    pages.
    """
    settings = wanted.get("settings", "")
    variants = [wanted["variant"]] if "variant" in wanted else _OURS
    shape = {n: value for n, value in wanted.items() if n not in ("settings", "variant")}
    chosen = [row for row in rows if row["ms_p50"] and _fits(row, shape)]
    for ours in chosen:
        dense = [r for r in chosen if r["op"] == "dense" and r["date"] == ours["date"]]
        is_ours = ours["op"] == "infllm_attention" and ours["variant"] in variants
        if is_ours and ours.get("settings", "") == settings and dense:
            return Medians(float(ours["ms_p50"]), min(float(row["ms_p50"]) for row in dense))
    raise LookupError(f"no rows for {wanted}")


def speed_up(rows: list[dict[str, str]], wanted: dict[str, str]) -> float:
    """Time of the fastest dense attention over ours."""
    found = medians(rows, wanted)
    return found.dense / found.ours


def selection_milliseconds(rows: list[dict[str, str]], wanted: dict[str, str]) -> float:
    """Median of the first run that has it, with ``settings`` as for ``medians``."""
    shape = {"op": "select_blocks", "settings": "", **wanted}
    found = [row for row in rows if row["ms_p50"] and _fits(row, shape)]
    if not found:
        raise LookupError(f"no rows for {wanted}")
    return float(found[0]["ms_p50"])


def microseconds_lost(rows: list[dict[str, str]], wanted: dict[str, str]) -> float:
    """How much longer ours takes than the fastest dense attention."""
    found = medians(rows, wanted)
    return 1000 * (found.ours - found.dense)


def of_windows(rows: list[dict[str, str]], wanted: dict[str, str]) -> float:
    """Our speed-up with ``settings`` over the one with those of ``attention:``."""
    return speed_up(rows, wanted) / speed_up(rows, {**wanted, "settings": ""})


def pages_cost(rows: list[dict[str, str]], wanted: dict[str, str]) -> float:
    """How much longer ours takes over pages than over one piece, in percent."""
    paged = medians(rows, {**wanted, "variant": "decode_paged"})
    return 100 * (paged.ours / medians(rows, wanted).ours - 1)


def model_speed_up(rows: list[dict[str, str]], wanted: dict[str, str]) -> float:
    """Time of a dense model over that of the same model patched."""
    times = {
        row["attention"]: float(row["ms_p50"])
        for row in rows
        if row["result"] == "measured" and row["ms_p50"] and _fits(row, wanted)
    }
    if len(times) != 2:
        raise LookupError(f"no rows for {wanted}")
    return times["dense"] / times["sparse"]


def share_of_dense(rows: list[dict[str, str]], wanted: dict[str, str]) -> float:
    """Correct answers over those of the dense model, over the seeds that the variant has."""
    ours = [row for row in rows if _fits(row, wanted)]
    dense = [
        row
        for row in rows
        if _fits(row, {**wanted, "variant": "dense"}) and row["seed"] in {r["seed"] for r in ours}
    ]
    if not ours or len(ours) != len(dense):
        raise LookupError(f"no rows for {wanted}")
    return sum(int(row["hits"]) for row in ours) / sum(int(row["hits"]) for row in dense)


_FORMULAS = {
    "milliseconds": lambda rows, wanted: medians(rows, wanted).ours,
    "microseconds": lambda rows, wanted: 1000 * medians(rows, wanted).ours,
    "dense_microseconds": lambda rows, wanted: 1000 * medians(rows, wanted).dense,
    "paged_microseconds": lambda rows, wanted: (
        1000 * medians(rows, {**wanted, "variant": "decode_paged"}).ours
    ),
    "selection_milliseconds": selection_milliseconds,
    "microseconds_lost": microseconds_lost,
    "speed_up": speed_up,
    "of_windows": of_windows,
    "pages_cost": pages_cost,
    "model_speed_up": model_speed_up,
    "share_of_dense": share_of_dense,
}


def _fits(row: dict[str, str], wanted: dict[str, str]) -> bool:
    return all(
        row[name].startswith(value) if name == "commit" else row[name] == value
        for name, value in wanted.items()
    )


def is_rounded(shown: str, value: float) -> bool:
    decimals = len(shown.partition(".")[2])
    return abs(float(shown) - value) <= 0.5 * 10**-decimals + 1e-9


def faults(text: str) -> list[str]:
    found = []
    for file, rules, shown in figures(text):
        if not rules:
            found.append(f"{file.name}: the comment names no rows, e.g. speed_up Hq=32 S=1024,2048")
            continue
        values = [value for rule in rules for value in expected(file, rule)]
        if len(values) != len(shown):
            found.append(
                f"{file.name}: {len(shown)} numbers are shown, the rows give {len(values)}"
            )
            continue
        found += [
            f"{file.name}: {number} is shown, the rows give {value:.4f}"
            for number, value in zip(shown, values, strict=True)
            if not is_rounded(number, value)
        ]
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_figures_follow_from_the_rows_that_their_comment_names(page):
    assert not faults(page.read_text())


def test_readme_has_figures_and_none_without_rows():
    text = prose(ROOT / "README.md")
    assert len(figures(text)) >= 4
    sourced = re.split(r"\n\s*\n", re.sub(_COMMENT, "FIGURES", text))
    loose = [p for p in sourced if "FIGURES" not in p and _MEASURED.search(p)]
    assert not loose, f"no comment names the rows of these figures: {loose}"


def test_every_number_in_readme_that_changes_in_its_last_digit_is_found():
    text = (ROOT / "README.md").read_text()
    numbers = 0
    for comment in _COMMENT.finditer(text):
        paragraph = _above(text, comment)
        start = text.rindex(paragraph, 0, comment.start())
        for number in _DECIMAL.finditer(paragraph):
            shown = number[0]
            decimals = len(shown.partition(".")[2])
            changed = f"{float(shown) + 10**-decimals:.{decimals}f}"
            before, after = text[: start + number.start()], text[start + number.end() :]
            assert len(faults(before + changed + after)) == 1, f"{shown} to {changed}"
            numbers += 1
    assert numbers > 40
