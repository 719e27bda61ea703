"""Curves over position as a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

# Dark enough on white, and apart for colour-blind eyes.
_COLOURS = ("#999999", "#0072b2", "#d55e00", "#009e73", "#cc79a7")


def plot_by_position(
    path: Path, bits: Mapping[str, Tensor], smooth: int, marks: Mapping[int, str], title: str
) -> None:
    """Draw the mean cost by position, one curve per model.

    Args:
        path: The PNG to write.
        bits: Per model ``[N, S]`` costs in bits, of the same text.
        smooth: Width of the running mean, in tokens.
        marks: Vertical lines: position to what it says.
        title: Above the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for (name, values), colour in zip(bits.items(), _COLOURS, strict=False):
        curve = values.mean(0).unfold(0, smooth, smooth).mean(1)
        centres = [smooth * (index + 0.5) for index in range(len(curve))]
        axes.plot(centres, curve.tolist(), label=name, color=colour, linewidth=1.6)
    for position, text in marks.items():
        axes.axvline(position, color="#bbbbbb", linewidth=0.8, linestyle="--", zorder=0)
        axes.annotate(
            text,
            (position, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            va="top",
            fontsize=7,
            color="#666666",
        )
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("position in the text (bytes before)")
    axes.set_ylabel("bits per byte (lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))
