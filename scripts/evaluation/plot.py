"""Curves over position as a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

# Dark enough on white, and apart for colour-blind eyes.
_COLOURS = ("#999999", "#0072b2", "#d55e00", "#009e73", "#cc79a7")


def plot_by_position(
    path: Path, bits: Mapping[str, Tensor], baseline: str, smooth: int, title: str
) -> None:
    """Draw the cost by position of several models, and of those near one of them, the difference.

    Args:
        path: The PNG to write.
        bits: Per model ``[N, S]`` costs in bits, of the same text.
        baseline: The model that the right half compares with. Models that are more than half a bit
            away on average would flatten it and are left out there.
        smooth: Width of the running mean, in tokens.
        title: Above the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=130, layout="constrained")
    level, difference = figure.subplots(1, 2)
    for (name, values), colour in zip(bits.items(), _COLOURS, strict=False):
        dashes = "--" if name == baseline else "-"  # it lies under those that equal it
        _draw(level, values, smooth, label=name, color=colour, linestyle=dashes, zorder=3)
        apart = values - bits[baseline]
        if apart.mean().abs() < 0.5:
            _draw(difference, apart, 2 * smooth, label=name, color=colour, linestyle=dashes)
    level.set_ylabel("bits per byte (lower is better)")
    difference.set_ylabel(f"bits per byte more than {baseline}")
    for axes in (level, difference):
        axes.set_xlabel("position in the text (bytes)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _draw(axes: Any, values: Tensor, smooth: int, **style: Any) -> None:
    smooth = min(smooth, values.shape[1])
    curve = values.mean(0).unfold(0, smooth, smooth).mean(1)
    centres = [smooth * (index + 0.5) for index in range(len(curve))]
    axes.plot(centres, curve.tolist(), linewidth=1.6, **style)
