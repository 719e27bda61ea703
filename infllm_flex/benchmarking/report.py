"""What a run found, for people: one line per shape, speed-ups, and the limits it was held to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Row = Mapping[str, str]

SHAPE = ("device", "dtype", "B", "Hq", "Hkv", "D", "mode", "inputs", "S")
_BASELINES = ("dense", "nsa")  # by op; only the first decides how fast we are


def by_shape(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[tuple[str, str], float]]:
    """Medians by what was measured, apart for each shape; of repeated ones, the newest.

    Args:
        rows: Of the CSV.

    Returns:
        ``{values of SHAPE: {(op, variant): milliseconds}}`` in the order of the rows.
    """
    shapes: dict[tuple[str, ...], dict[tuple[str, str], float]] = {}
    for row in rows:
        if row["ms_p50"] and row["op"] != "model":
            times = shapes.setdefault(tuple(row[name] for name in SHAPE), {})
            times[row["op"], row["variant"]] = float(row["ms_p50"])
    return {shape: times for shape, times in shapes.items() if any(_engines(times))}


def by_run(
    rows: Iterable[Row],
) -> dict[tuple[str, ...], list[dict[tuple[str, str], float]]]:
    """Medians as of ``by_shape``, of each run apart, the newest run first.

    Only times of one run compare: another card, or another hour, has other times.
    """
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["date"], []).append(row)
    measured: dict[tuple[str, ...], list[dict[tuple[str, str], float]]] = {}
    for of_run in runs.values():
        for shape, times in by_shape(of_run).items():
            measured.setdefault(shape, []).insert(0, times)
    return measured


def speed_ups(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, float]]:
    """Say how many times as fast as the fastest dense attention each engine was, by shape.

    Of each engine the newest run counts that measured that dense attention, too.

    Returns:
        ``{values of SHAPE: {engine: ratio}}``.
    """
    ratios: dict[tuple[str, ...], dict[str, float]] = {}
    for shape, runs in by_run(rows).items():
        newest = {key: ms for times in reversed(runs) for key, ms in times.items()}
        dense = fastest_dense(newest)
        for times in runs:
            if dense and ("dense", dense[0]) in times:
                for engine in _engines(times):
                    ratio = times["dense", dense[0]] / times["infllm_attention", engine]
                    ratios.setdefault(shape, {}).setdefault(engine, ratio)
    return ratios


def fastest_dense(times: Mapping[tuple[str, str], float]) -> tuple[str, float] | None:
    """Name and milliseconds of the fastest dense attention at a shape."""
    dense = [(ms, variant) for (op, variant), ms in times.items() if op == "dense"]
    if not dense:
        return None
    ms, variant = min(dense)
    return variant, ms


def speed_table(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """Milliseconds of the stages, of their sum, of every other attention, and ratios of the sums.

    Returns:
        Header and cells of a table: a line per shape and engine.
    """
    shapes = by_shape(rows)
    measured = dict.fromkeys(key for times in shapes.values() for key in times)
    baselines = [key for op in _BASELINES for key in measured if key[0] == op]
    header = [
        "mode",
        "queries",
        "batch",
        "heads",
        "tokens",
        "engine",
        "select",
        "lists",
        "attend",
        "all ms",
    ]
    header += [title for _, name in baselines for title in (name, "x")]
    lines = []
    for shape, times in shapes.items():
        at = dict(zip(SHAPE, shape, strict=True))
        for engine in _engines(times):
            total = times["infllm_attention", engine]
            line = [at["mode"], at["inputs"], at["B"], f"{at['Hq']}/{at['Hkv']}", at["S"], engine]
            stages = (("select_blocks", ""), ("build_lists", engine), ("attend", engine))
            line += [_ms(times.get(stage)) for stage in stages]
            line.append(_ms(total))
            for baseline in baselines:
                ms = times.get(baseline)
                line += [_ms(ms), "" if ms is None else f"{ms / total:.2f}"]
            lines.append(line)
    return header, lines


def model_ratio(rows: Sequence[Row]) -> float:
    """Median of the patched model over that of the unpatched one, in the model's whole step."""
    last = {row["variant"]: float(row["ms_p50"]) for row in rows if row["op"] == "model"}
    return last["patched"] / last["unpatched"]


def verdict(what: str, value: float, limit: float, unit: str) -> str:
    """A figure beside its limit."""
    reached = "reached" if value <= limit else "NOT reached"
    return f"{what}: {value:,.4g}{unit}, at most {limit:,.4g}{unit}: {reached}"


def _engines(times: Mapping[tuple[str, str], float]) -> list[str]:
    return [variant for op, variant in times if op == "infllm_attention"]


def _ms(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
