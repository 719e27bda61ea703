"""Two pictures of a CSV: the speed-up against the length, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infllm_flex.benchmarking.report import SHAPE, Row, by_shape, fastest_dense

# Dark enough on white, and apart for colour-blind eyes.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#999999")
_MODES = ("forward", "forward+backward")
_STAGES = {"select_blocks": "selection", "build_lists": "lists", "attend": "attention"}


def plot_speed_up(path: Path, rows: Sequence[Row]) -> None:
    """Draw how much faster than the fastest dense attention each engine is, by length.

    Args:
        path: The PNG to write.
        rows: Of the CSV.

    Raises:
        ValueError: The rows compare nothing.
    """
    lines: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    for shape, times in by_shape(rows).items():
        at, dense = dict(zip(SHAPE, shape, strict=True)), fastest_dense(times)
        for (op, engine), ms in times.items():
            if op == "infllm_attention" and dense is not None and at["mode"] in _MODES:
                batch = () if at["B"] == "1" else (f"batch {at['B']}",)
                line = (
                    f"{at['Hq']}/{at['Hkv']}",
                    at["mode"],
                    f"{at['inputs']} queries",
                    engine,
                    *batch,
                )
                lines.setdefault(line, []).append((int(at["S"]), dense[1] / ms))
    if not lines:
        raise ValueError("nothing to draw: no sparse attention beside a dense one")
    figure, axes = _figure(1)
    for index, (name, points) in enumerate(lines.items()):
        lengths, ratios = zip(*sorted(points), strict=True)
        dashes = "--" if "forward" in name else "-"
        axes.plot(
            lengths,
            ratios,
            dashes,
            marker="o",
            markersize=4,
            color=_COLOURS[index % len(_COLOURS)],
            label=", ".join(name),
        )
    axes.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set_xscale("log", base=2)
    ticks = sorted({length for points in lines.values() for length, _ in points})
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("times as fast as the fastest dense attention")
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path, rows)


def plot_stages(path: Path, rows: Sequence[Row]) -> None:
    """Draw what each stage takes of the sum of them, a bar per length, mode and engine.

    Args:
        path: The PNG to write.
        rows: Of the CSV.

    Raises:
        ValueError: The rows hold no stages.
    """
    bars = []
    for shape, times in by_shape(rows).items():
        at = dict(zip(SHAPE, shape, strict=True))
        for op, engine in times:
            if op == "attend" and at["mode"] in _MODES:
                stages = [
                    times.get((stage, "" if stage == "select_blocks" else engine), 0.0)
                    for stage in _STAGES
                ]
                mode = "fwd" if at["mode"] == "forward" else "fwd+bwd"
                label = f"{mode} {at['Hq']}/{at['Hkv']} {int(at['S']):,}\n{at['inputs']} {engine}"
                bars.append((label, stages))
    if not bars:
        raise ValueError("nothing to draw: no stages")
    figure, axes = _figure(max(1.0, len(bars) / 10))
    places = range(len(bars))
    left = [0.0] * len(bars)
    for index, name in enumerate(_STAGES.values()):
        shares = [100 * stages[index] / sum(stages) for _, stages in bars]
        axes.barh(places, shares, left=left, color=_COLOURS[index], label=name)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_yticks(places, [label for label, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the time")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    _save(figure, path, rows)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5 * height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path, rows: Sequence[Row]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    newest = rows[-1]
    figure.suptitle(
        f"{newest['device']}, {newest['dtype']}, D {newest['D']}, torch {newest['torch']}, "
        f"{newest['commit']}, {newest['date'][:10]}",
        fontsize=8,
    )
    FigureCanvasAgg(figure).print_png(str(path))
