"""Predict times on a card from its rates, and from the instructions of its kernels.

Attention walks over steps of some rows and keys. A step needs cycles for its matrix products, and
cycles in which its instructions are issued, one per cycle and scheduler. Where other programs of
the multiprocessor fill every gap a step costs the larger of both, where none does their sum. The
prediction is the sum times a factor for the rest: waiting for loads, and tiles of other lengths,
which load other unions than at 64K, where they were counted. The factor is fitted on one card, for
each shape, and kept for the others. Loads have no term of their own: the keys of a step are mostly
in the L2 cache, whose rate is not published.

Selection and steps of decoding have no step model: selection reaches a fraction of the peak of
matrix products, and a step of decoding takes a constant and its bytes. Both are fitted, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from benchmarking.other_gpus.cards import Card
from benchmarking.other_gpus.resources import KernelUse
from benchmarking.settings import BenchmarkSettings, Heads
from benchmarking.work import visible_pairs, work_of

Row = Mapping[str, str]
ATTEND, BACKWARD, SELECT, DECODE = "attention", "attention, backward", "selection", "decode step"
_SCHEDULERS = 4  # of a multiprocessor; each issues one instruction per cycle
# The kernels that an operation launches one after the other, each under its names on different
# cards, and the products of [rows, D] with [D, keys], or of that size, that it has in a step.
_PRODUCTS: dict[str, dict[tuple[str, ...], int]] = {
    ATTEND: {("attend_kernel", "attend_specialized_kernel"): 2},
    BACKWARD: {("dq_kernel",): 3, ("dkv_kernel",): 4},
}


class Case(NamedTuple):
    """An operation at a shape, whose time is predicted; ``measured`` milliseconds, or 0."""

    what: str
    heads: Heads
    S: int
    batch: int = 1
    measured: float = 0.0

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads.query // self.heads.kv


class Bounds(NamedTuple):
    """Milliseconds: where products and other instructions overlap, and where they do not."""

    overlapped: float
    serial: float


class Fit(NamedTuple):
    """Numbers fitted on one card.

    Attributes:
        factors: Time of attention and its backward over that without overlap, by heads of a
            group and tokens.
        fraction: Fraction of the peak of matrix products that selection reaches, by heads of a
            group.
        constant: Milliseconds of a step of decoding beyond its bytes.
        slowness: Its milliseconds of bytes over those at the peak of memory.
    """

    factors: Mapping[tuple[str, int, int], float]
    fraction: Mapping[int, float]
    constant: float
    slowness: float


class Model:
    """Predicts times on any card.

    Args:
        settings: Attention settings, head dim and dtype of the rows.
        uses: Kernels on the cards' compute capabilities.
        inflation: Blocks that a tile of 64 rows loads per block that a token selects, by heads of
            a group.
    """

    def __init__(
        self,
        settings: BenchmarkSettings,
        uses: Iterable[KernelUse],
        inflation: Mapping[int, float],
    ) -> None:
        self._settings, self._inflation = settings, inflation
        self._uses = {(use.kernel, use.group, use.capability): use for use in uses}

    def covers(self, case: Case, card: Card) -> bool:
        """Whether the model has what it needs for a case."""
        if case.what not in _PRODUCTS:
            return True
        found = self._kernels(case, card)
        return case.group in self._inflation and len(found) == len(_PRODUCTS[case.what])

    def _kernels(self, case: Case, card: Card) -> list[tuple[KernelUse, int]]:
        """Return the kernels of a case on a card, and the products of a step of each."""
        return [
            (self._uses[name, case.group, card.capability], products)
            for names, products in _PRODUCTS[case.what].items()
            for name in names
            if (name, case.group, card.capability) in self._uses
        ]

    def bounds(self, case: Case, card: Card) -> Bounds:
        """Return the bounds of attention, or of its backward."""
        D = self._settings.shapes.head_dim
        pairs = visible_pairs(self._settings.attention, case.S) * case.heads.query * case.batch
        overlapped = serial = 0.0
        for use, num_products in self._kernels(case, card):
            size = use.rows * use.keys
            steps = pairs * self._inflation[case.group] / size
            products = 2.0 * num_products * size * D / card.products_per_cycle
            issue = use.instructions * use.warps / _SCHEDULERS
            ms = 1e3 * steps / card.processors / card.hertz
            overlapped += ms * max(products, issue)
            serial += ms * (products + issue)
        return Bounds(overlapped, serial)

    def fit(self, cases: Sequence[Case], card: Card) -> Fit:
        """Fit on measurements of one card."""
        factors: dict[tuple[str, int, int], list[float]] = {}
        fractions: dict[int, list[float]] = {}
        for case in cases:
            if case.what in _PRODUCTS and self.covers(case, card):
                ratio = case.measured / self.bounds(case, card).serial
                factors.setdefault((case.what, case.group, case.S), []).append(ratio)
            if case.what == SELECT:
                share = self._floor(case, card)[0] / case.measured
                fractions.setdefault(case.group, []).append(share)
        steps = [(self._floor(c, card)[1], c.measured) for c in cases if c.what == DECODE]
        constant, slowness = _line(steps)
        return Fit(
            {place: median(values) for place, values in factors.items()},
            {group: median(values) for group, values in fractions.items()},
            constant,
            slowness,
        )

    def predict(self, case: Case, card: Card, fit: Fit) -> float | None:
        """Return milliseconds; None where the fit lacks the shape."""
        if case.what in _PRODUCTS:
            if (case.what, case.group, case.S) not in fit.factors:
                return None
            return fit.factors[case.what, case.group, case.S] * self.bounds(case, card).serial
        products, memory = self._floor(case, card)
        if case.what == SELECT:
            return products / fit.fraction[case.group]
        return fit.constant + fit.slowness * memory

    def _floor(self, case: Case, card: Card) -> tuple[float, float]:
        """Return milliseconds of the products and of the bytes of a case at a card's peaks."""
        op, mode = ("select_blocks", "forward")
        if case.what == DECODE:
            op, mode = ("infllm_attention", "decode")
        work = work_of(op, mode, self._settings, case.heads, case.S)
        assert work is not None  # both operations have a bound
        scale = 1e3 * case.batch / 1e12
        return scale * work.flops / card.tflops, scale * work.bytes / card.terabytes


def cases_of(rows: Iterable[Row], card: Card) -> list[Case]:
    """Return what was measured on a card with the engine ``auto``; the newest row counts."""
    kinds = {
        ("attend", "forward"): ATTEND,
        ("attend", "backward"): BACKWARD,
        ("select_blocks", "forward"): SELECT,
        ("infllm_attention", "decode"): DECODE,
    }
    found: dict[tuple[str, Heads, int, int], Case] = {}
    for row in rows:
        what = kinds.get((row["op"], row["mode"]))
        # Inputs of decoding do not matter.
        if what is None or (row["inputs"] != "text" and what != DECODE):
            continue
        if row["device"] != card.device or row["settings"] or row["variant"] not in _VARIANTS:
            continue
        heads = Heads(int(row["Hq"]), int(row["Hkv"]))
        case = Case(what, heads, int(row["S"]), int(row["B"]), float(row["ms_p50"] or 0))
        found[case[:4]] = case
    return [case for case in found.values() if case.measured]


_VARIANTS = ("", "auto", "decode")
_TILING = re.compile(r"64 rows, u = ([\d.]+)")


def inflation_of(rows: Iterable[Row]) -> dict[int, float]:
    """Read the blocks that tiles of 64 rows load, by heads of a group, from rows of tilings."""
    found = {}
    for row in rows:
        if row["op"] == "attend_blocks" and (tiling := _TILING.match(row["variant"])):
            found[int(row["Hq"]) // int(row["Hkv"])] = float(tiling[1])
    return found


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fit ``y = constant + slope x`` so that relative errors are small; neither is negative."""
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    above = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    below = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = max(0.0, above / below)
    return max(0.0, mean_y - slope * mean_x), slope
