"""Tables of a run: one line per shape, speed-ups, and comparisons with limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Row = Mapping[str, str]

SHAPE = ("device", "dtype", "B", "Hq", "Hkv", "D", "mode", "inputs", "S")
DENSE_PAGED = "dense_paged"  # a value of the column op: dense attention over pages
PAGED, DECODE_PAGED = "paged", "decode_paged"  # variants of ours over pages
_BASELINES = ("dense", DENSE_PAGED, "nsa", "rival")  # values of the column op


class Method(NamedTuple):
    """A timed method: three columns of the CSV."""

    op: str
    variant: str
    settings: str = ""

    @property
    def label(self) -> str:
        """The engine, and its attention settings where they are not those of ``attention``."""
        return f"{self.variant}, {self.settings}" if self.settings else self.variant

    @property
    def is_paged(self) -> bool:
        """Whether it is sparse attention over pages, to be compared with dense one over pages."""
        return self.op == "infllm_attention" and self.variant in (PAGED, DECODE_PAGED)


Times = Mapping[Method, float]
# Why attentions have no time at a shape: a word, a colon and the rest.
Reasons = Mapping[tuple[str, ...], Mapping[str, str]]


def by_shape(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[Method, float]]:
    """Group medians by shape and method; the newest row of a repeated measurement counts.

    Args:
        rows: Rows of the CSV.

    Returns:
        ``{values of SHAPE: {method: milliseconds}}`` in the order of the rows.
    """
    shapes: dict[tuple[str, ...], dict[Method, float]] = {}
    for row in rows:
        if row["ms_p50"] and row["op"] != "model":
            times = shapes.setdefault(shape_of(row), {})
            times[Method(row["op"], row["variant"], row["settings"])] = float(row["ms_p50"])
    return {shape: times for shape, times in shapes.items() if any(_engines(times))}


def by_run(rows: Iterable[Row]) -> dict[tuple[str, ...], list[dict[Method, float]]]:
    """Group medians as ``by_shape`` does, for each run separately, the newest run first.

    Only times of one run can be compared: cards differ, and so does one card over time.
    """
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["date"], []).append(row)
    measured: dict[tuple[str, ...], list[dict[Method, float]]] = {}
    for of_run in runs.values():
        for shape, times in by_shape(of_run).items():
            measured.setdefault(shape, []).insert(0, times)
    return measured


def speed_ups(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, float]]:
    """Return the ratios of `speed_ups_of_methods` by label.

    Returns:
        ``{values of SHAPE: {label of engine and attention settings: ratio}}``.
    """
    return {
        shape: {method.label: ratio for method, ratio in ratios.items()}
        for shape, ratios in speed_ups_of_methods(rows).items()
    }


def speed_ups_of_methods(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[Method, float]]:
    """Compute the speed-up of each engine over the fastest dense attention, by shape.

    Attention over pages is compared with dense attention over pages, other attention with dense
    attention over one piece. For each engine, the newest run that also measured that dense
    attention counts.

    Returns:
        ``{values of SHAPE: {engine with attention settings: ratio}}``.
    """
    ratios: dict[tuple[str, ...], dict[Method, float]] = {}
    for shape, runs in by_run(rows).items():
        newest = {key: ms for times in reversed(runs) for key, ms in times.items()}
        for times in runs:
            for ours in _engines(times):
                dense = fastest_dense(newest, ours)
                if dense in times:
                    ratio = times[dense] / times[ours]
                    ratios.setdefault(shape, {}).setdefault(ours, ratio)
    return ratios


def fastest_dense(times: Times, ours: Method) -> Method | None:
    """Return the fastest dense attention at a shape that an attention is compared with."""
    op = DENSE_PAGED if ours.is_paged else "dense"
    return min((method for method in times if method.op == op), key=times.__getitem__, default=None)


def shape_of(row: Row) -> tuple[str, ...]:
    """Return the cells that identify a shape."""
    return tuple(row[name] for name in SHAPE)


def speed_table(
    rows: Iterable[Row], reasons: Reasons | None = None
) -> tuple[list[str], list[list[str]]]:
    """Tabulate milliseconds of stages, whole attention and baselines, and the ratios of the last.

    Where a run has ``variants``, the column ``x default`` is the speed-up over ``attention`` by the
    same engine. Where it has dense attention over pages, attention over pages has the fastest of
    them in the columns ``fastest over pages`` and ``x pages``.

    Args:
        rows: Rows of the CSV.
        reasons: Why baselines have no time; its first words stand in their cells.

    Returns:
        Header and cells of a table: a line per shape, engine and attention settings.
    """
    shapes, reasons = by_shape(rows), reasons or {}
    measured = dict.fromkeys(method for times in shapes.values() for method in times)
    baselines = [method for op in _BASELINES for method in measured if method.op == op]
    absent = dict.fromkeys(name for shape in shapes for name in reasons.get(shape, ()))
    named = {method.variant for method in baselines}
    baselines += [Method("", name) for name in absent if name not in named]
    compares = any(method.settings for method in measured)
    header = ["mode", "queries", "batch", "heads", "tokens", "engine"]
    header += ["settings"] * compares + ["select", "lists", "attend", "all ms"]
    header += ["x default"] * compares
    has_pages = any(method.op == DENSE_PAGED for method in measured)
    header += ["fastest over pages", "x pages"] * has_pages
    header += [title for method in baselines for title in (method.variant, "x")]
    lines = []
    for shape, times in shapes.items():
        at = dict(zip(SHAPE, shape, strict=True))
        place = [at["mode"], at["inputs"], at["B"], f"{at['Hq']}/{at['Hkv']}", at["S"]]
        for ours in _engines(times):
            line = [*place, ours.variant, *[ours.settings or "default"] * compares]
            line += [_ms(times.get(stage)) for stage in stages_of(ours)]
            line.append(_ms(times[ours]))
            line += [_ratio(times.get(ours._replace(settings="")), times[ours])] * compares
            dense = fastest_dense(times, ours) if ours.is_paged else None
            best = ["", ""] if dense is None else [dense.variant, _ratio(times[dense], times[ours])]
            line += best * has_pages
            for baseline in baselines:
                ms = times.get(baseline)
                word = reasons.get(shape, {}).get(baseline.variant, "").partition(":")[0]
                is_fair = baseline.op != DENSE_PAGED or ours.is_paged
                line += [_ms(ms) or word, _ratio(ms, times[ours]) if is_fair else ""]
            lines.append(line)
    return header, lines


def stages_of(ours: Method) -> tuple[Method, Method, Method]:
    """Return the methods of selection, lists and attention of an engine's whole attention."""
    return (
        Method("select_blocks", "", ours.settings),
        ours._replace(op="build_lists"),
        ours._replace(op="attend"),
    )


def model_ratio(rows: Sequence[Row]) -> float:
    """Return the median time of the patched model over that of the unpatched model."""
    last = {row["variant"]: float(row["ms_p50"]) for row in rows if row["op"] == "model"}
    return last["patched"] / last["unpatched"]


def verdict(what: str, value: float, limit: float, unit: str) -> str:
    """Compare a figure with its limit."""
    reached = "reached" if value <= limit else "NOT reached"
    return f"{what}: {value:,.4g}{unit}, at most {limit:,.4g}{unit}: {reached}"


def _engines(times: Times) -> list[Method]:
    return [method for method in times if method.op == "infllm_attention"]


def _ratio(other: float | None, ours: float) -> str:
    return "" if other is None else f"{other / ours:.2f}"


def _ms(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
