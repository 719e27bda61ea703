"""Tables of a run: times of dense and patched models, where they go, and blocks of tiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from benchmarking.whole_models.kernel_groups import GROUPS
from benchmarking.whole_models.rows import MEASURED

Row = Mapping[str, str]
Table = tuple[list[str], list[list[str]]]
_PLACE = ("phase", "model", "activations", "layers", "B", "S")


def time_table(rows: Iterable[Row], whole: Mapping[str, int]) -> Table:
    """Tabulate the medians of both models, and dense over sparse time.

    Args:
        rows: Rows of the CSV.
        whole: Layers of each whole model; a part of a model is marked.
    """
    cells: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["phase"] != "overlap":
            cells.setdefault(tuple(row[name] for name in _PLACE), {})[row["attention"]] = row
    header = ["phase", "model", "activations", "layers", "batch", "tokens"]
    header += ["dense ms", "patched ms", "x", "dense MiB", "patched MiB"]
    lines = []
    for place, pair in cells.items():
        of_place = list(place)
        of_place[3] = layers_of(place[3], whole.get(place[1], 0))
        dense, sparse = pair.get("dense"), pair.get("sparse")
        both = dense and sparse and dense["ms_p50"] and sparse["ms_p50"]
        ratio = ""
        if dense and sparse and both:
            ratio = f"{float(dense['ms_p50']) / float(sparse['ms_p50']):.2f}"
        times = [_time(dense), _time(sparse), ratio]
        lines.append(of_place + times + [x["peak_mib"] if x else "" for x in (dense, sparse)])
    return header, lines


def profile_table(rows: Iterable[Row]) -> Table:
    """Tabulate milliseconds by group of kernels, of one profiled run each."""
    groups = (*GROUPS, "gaps")
    header = ["phase", "model", "activations", "layers", "batch", "tokens", "attention", *groups]
    lines = []
    for row in rows:
        times = [row[f"ms_{group}"] for group in groups]
        if any(times):
            lines.append(
                [row[name] for name in (*_PLACE, "attention")] + [_short(t) for t in times]
            )
    return header, lines


def overlap_table(rows: Iterable[Row]) -> Table:
    """Tabulate the blocks that a tile loads, per block that one of its tokens selects."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        if row["phase"] == "overlap":
            place = tuple(row[name] for name in ("model", "activations", "S"))
            cell = row["inflation"] or row["result"]
            lines.setdefault(place, {})[row["tile_tokens"] or "2"] = cell
    sizes = sorted({int(tokens) for line in lines.values() for tokens in line})
    header = ["model", "activations", "tokens", *(f"{size} tokens" for size in sizes)]
    return header, [
        [*place, *(line.get(str(size), "") for size in sizes)] for place, line in lines.items()
    ]


def layers_of(built: str, whole: int) -> str:
    """Return the layers that were built, of how many."""
    return built if not whole or built == str(whole) else f"{built} of {whole}"


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    return _short(row["ms_p50"]) if row["result"] == MEASURED else short_reason(row["result"])


def short_reason(result: str) -> str:
    """Shorten the reason that stands in a cell instead of a time."""
    return result.partition(":")[0]


def _short(milliseconds: str) -> str:
    if not milliseconds:
        return ""
    value = float(milliseconds)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def tables(rows: Sequence[Row], whole: Mapping[str, int]) -> dict[str, Table]:
    """Return all tables that have lines, by title."""
    found = {
        "medians of a step in ms; x: dense over patched time": time_table(rows, whole),
        "ms by group of kernels, one run under the profiler": profile_table(rows),
        "blocks that a tile loads, per block that one of its tokens selects": overlap_table(rows),
    }
    return {title: table for title, table in found.items() if table[1]}
