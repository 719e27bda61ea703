"""What a run found, for people: one line per shape, speed-ups, and the limits it was held to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Row = Mapping[str, str]

SHAPE = ("device", "dtype", "B", "Hq", "Hkv", "D", "mode", "inputs", "S")
_BASELINES = ("dense", "nsa")  # by op; only the first decides how fast we are


class What(NamedTuple):
    """What was timed: three columns of the CSV."""

    op: str
    variant: str
    settings: str = ""

    @property
    def label(self) -> str:
        """The engine, and its attention settings where they are not those of ``attention``."""
        return f"{self.variant}, {self.settings}" if self.settings else self.variant


Times = Mapping[What, float]


def by_shape(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[What, float]]:
    """Medians by what was measured, apart for each shape; of repeated ones, the newest.

    Args:
        rows: Of the CSV.

    Returns:
        ``{values of SHAPE: {what: milliseconds}}`` in the order of the rows.
    """
    shapes: dict[tuple[str, ...], dict[What, float]] = {}
    for row in rows:
        if row["ms_p50"] and row["op"] != "model":
            times = shapes.setdefault(tuple(row[name] for name in SHAPE), {})
            times[What(row["op"], row["variant"], row["settings"])] = float(row["ms_p50"])
    return {shape: times for shape, times in shapes.items() if any(_engines(times))}


def by_run(rows: Iterable[Row]) -> dict[tuple[str, ...], list[dict[What, float]]]:
    """Medians as of ``by_shape``, of each run apart, the newest run first.

    Only times of one run compare: another card, or another hour, has other times.
    """
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["date"], []).append(row)
    measured: dict[tuple[str, ...], list[dict[What, float]]] = {}
    for of_run in runs.values():
        for shape, times in by_shape(of_run).items():
            measured.setdefault(shape, []).insert(0, times)
    return measured


def speed_ups(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, float]]:
    """Say how many times as fast as the fastest dense attention each engine was, by shape.

    Of each engine the newest run counts that measured that dense attention, too.

    Returns:
        ``{values of SHAPE: {label of engine and attention settings: ratio}}``.
    """
    ratios: dict[tuple[str, ...], dict[str, float]] = {}
    for shape, runs in by_run(rows).items():
        newest = {key: ms for times in reversed(runs) for key, ms in times.items()}
        dense = fastest_dense(newest)
        for times in runs:
            if dense and What("dense", dense[0]) in times:
                for ours in _engines(times):
                    ratio = times[What("dense", dense[0])] / times[ours]
                    ratios.setdefault(shape, {}).setdefault(ours.label, ratio)
    return ratios


def fastest_dense(times: Times) -> tuple[str, float] | None:
    """Name and milliseconds of the fastest dense attention at a shape."""
    dense = [(ms, what.variant) for what, ms in times.items() if what.op == "dense"]
    if not dense:
        return None
    ms, variant = min(dense)
    return variant, ms


def speed_table(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """Milliseconds of the stages, of their sum, of every other attention, and ratios of the sums.

    Where attention settings were compared, ``x default`` is how many times as fast as those of
    ``attention`` by the same engine: their ratio to any baseline over the default's.

    Returns:
        Header and cells of a table: a line per shape, engine and attention settings.
    """
    shapes = by_shape(rows)
    measured = dict.fromkeys(what for times in shapes.values() for what in times)
    baselines = [what for op in _BASELINES for what in measured if what.op == op]
    compares = any(what.settings for what in measured)
    header = ["mode", "queries", "batch", "heads", "tokens", "engine"]
    header += ["settings"] * compares + ["select", "lists", "attend", "all ms"]
    header += ["x default"] * compares
    header += [title for what in baselines for title in (what.variant, "x")]
    lines = []
    for shape, times in shapes.items():
        at = dict(zip(SHAPE, shape, strict=True))
        place = [at["mode"], at["inputs"], at["B"], f"{at['Hq']}/{at['Hkv']}", at["S"]]
        for ours in _engines(times):
            line = [*place, ours.variant, *[ours.settings or "default"] * compares]
            line += [_ms(times.get(stage)) for stage in stages_of(ours)]
            line.append(_ms(times[ours]))
            line += [_ratio(times.get(ours._replace(settings="")), times[ours])] * compares
            for baseline in baselines:
                ms = times.get(baseline)
                line += [_ms(ms), _ratio(ms, times[ours])]
            lines.append(line)
    return header, lines


def stages_of(ours: What) -> tuple[What, What, What]:
    """Name selection, lists and attention of an engine's whole attention."""
    return (
        What("select_blocks", "", ours.settings),
        ours._replace(op="build_lists"),
        ours._replace(op="attend"),
    )


def model_ratio(rows: Sequence[Row]) -> float:
    """Median of the patched model over that of the unpatched one, in the model's whole step."""
    last = {row["variant"]: float(row["ms_p50"]) for row in rows if row["op"] == "model"}
    return last["patched"] / last["unpatched"]


def verdict(what: str, value: float, limit: float, unit: str) -> str:
    """A figure beside its limit."""
    reached = "reached" if value <= limit else "NOT reached"
    return f"{what}: {value:,.4g}{unit}, at most {limit:,.4g}{unit}: {reached}"


def _engines(times: Times) -> list[What]:
    return [what for what in times if what.op == "infllm_attention"]


def _ratio(other: float | None, ours: float) -> str:
    return "" if other is None else f"{other / ours:.2f}"


def _ms(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
