"""Two pictures of a CSV: the speed-up against the length, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarking.report import SHAPE, Row, by_run, speed_ups, stages_of

# Dark enough on white, and distinguishable with colour blindness.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#999999")
_DASHES = {"text": "-", "drifting": "--", "independent": ":"}
_MARKERS = ("o", "s", "^", "v")
_MODES = ("forward", "forward+backward")
_STAGES = ("selection", "lists", "attention")


class _Line(NamedTuple):
    mode: str
    heads: str
    inputs: str
    engine: str
    batch: str


class _Bar(NamedTuple):
    Hq: int
    Hkv: int
    inputs: str
    engine: str
    S: int

    def __str__(self) -> str:
        return f"{self.Hq}/{self.Hkv} {self.inputs}, {self.engine}, {_short(self.S)}"


def plot_speed_up(path: Path, rows: Sequence[Row]) -> None:
    """Draw the speed-up of each engine over the fastest dense attention, by length.

    Args:
        path: The PNG to write.
        rows: Rows of the CSV.

    Raises:
        ValueError: No row of a sparse attention has one of a dense attention beside it.
    """
    lines: dict[_Line, list[tuple[int, float]]] = {}
    for shape, of_engine in speed_ups(rows).items():
        at = dict(zip(SHAPE, shape, strict=True))
        for engine, ratio in of_engine.items():
            if at["mode"] in _MODES:
                line = _Line(at["mode"], f"{at['Hq']}/{at['Hkv']}", at["inputs"], engine, at["B"])
                lines.setdefault(line, []).append((int(at["S"]), ratio))
    if not lines:
        raise ValueError("nothing to draw: expected rows of sparse and of dense attention")
    modes = [mode for mode in _MODES if any(line.mode == mode for line in lines)]
    figure, panels = _figure(1, len(modes))
    heads, engines = (
        list(dict.fromkeys(getattr(line, name) for line in lines)) for name in ("heads", "engine")
    )
    for mode, axes in zip(modes, panels, strict=True):
        shown = {line: sorted(points) for line, points in lines.items() if line.mode == mode}
        for line, points in sorted(shown.items(), key=lambda item: -item[1][-1][1]):
            lengths, ratios = zip(*points, strict=True)
            batch = "" if line.batch == "1" else f", batch {line.batch}"
            axes.plot(
                lengths,
                ratios,
                _DASHES.get(line.inputs, "-."),
                marker=_MARKERS[engines.index(line.engine) % len(_MARKERS)],
                markersize=4,
                color=_COLOURS[heads.index(line.heads) % len(_COLOURS)],
                label=f"{line.heads}, {line.inputs} queries, {line.engine}{batch}",
            )
        axes.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.set_xscale("log", base=2)
        ticks = sorted({length for points in shown.values() for length, _ in points})
        axes.set_xticks(ticks, [_short(n) for n in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_title(mode, fontsize=9)
        axes.set_xlabel("tokens")
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("times as fast as the fastest dense attention")
    _save(figure, path, rows)


def _short(tokens: int) -> str:
    """Format a length as 32K or 1M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"


def plot_stages(path: Path, rows: Sequence[Row]) -> None:
    """Draw each stage's fraction of the time: a panel per mode, a bar per shape and engine.

    Args:
        path: The PNG to write.
        rows: Rows of the CSV.

    Raises:
        ValueError: The rows hold no stages.
    """
    bars: dict[str, dict[_Bar, list[float]]] = {}
    for shape, runs in by_run(rows).items():
        at = dict(zip(SHAPE, shape, strict=True))
        for times in runs:
            for method in times:
                if method.op == "attend" and at["mode"] in _MODES:
                    stages = [times.get(stage, 0.0) for stage in stages_of(method)]
                    heads = int(at["Hq"]), int(at["Hkv"])
                    bar = _Bar(*heads, at["inputs"], method.label, int(at["S"]))
                    bars.setdefault(at["mode"], {}).setdefault(bar, stages)  # newest run first
    if not bars:
        raise ValueError("nothing to draw: expected rows of the op attend, got none")
    modes = [mode for mode in _MODES if mode in bars]
    most = max(len(shown) for shown in bars.values())
    figure, panels = _figure(max(1.0, most / 22), len(modes))
    for mode, axes in zip(modes, panels, strict=True):
        shown = sorted(bars[mode].items())
        places = range(len(shown))
        left = [0.0] * len(shown)
        for index, name in enumerate(_STAGES):
            percent = [100 * stages[index] / sum(stages) for _, stages in shown]
            axes.barh(places, percent, left=left, color=_COLOURS[index], label=name)
            left = [a + b for a, b in zip(left, percent, strict=True)]
        axes.set_yticks(places, [str(bar) for bar, _ in shown], fontsize=7)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_title(mode, fontsize=9)
        axes.set_xlabel("% of the time")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    _save(figure, path, rows)


def _figure(height: float, num_panels: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    width = 8 if num_panels == 1 else 6 * num_panels
    figure = Figure(figsize=(width, 4.5 * height), dpi=150, layout="constrained")
    panels = [figure.add_subplot(1, num_panels, i + 1) for i in range(num_panels)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _save(figure: Any, path: Path, rows: Sequence[Row]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    newest = rows[-1]
    earlier = " and earlier" if any(row["commit"] != newest["commit"] for row in rows) else ""
    figure.suptitle(
        f"{newest['device']}, {newest['dtype']}, D {newest['D']}, torch {newest['torch']}, "
        f"{newest['commit']}, {newest['date'][:10]}{earlier}",
        fontsize=8,
    )
    FigureCanvasAgg(figure).print_png(str(path))
