"""Bar charts that compare a few kinds of attention, one panel for each number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Dark enough on white, and distinguishable with colour blindness.
_COLOURS = ("#0072b2", "#009e73", "#e69f00", "#888888")


@dataclass(frozen=True)
class Panel:
    """One number of every kind of attention.

    Attributes:
        title: Name of the number, and the better direction.
        values: The number by name of the attention.
        form: Format of a value, for ``str.format``.
        floor: Value at which bars begin.
    """

    title: str
    values: Mapping[str, float]
    form: str = "{:.0%}"
    floor: float = 0.0


def plot_bars(path: Path, rows: Sequence[tuple[str, Sequence[Panel]]], title: str) -> None:
    """Draw rows of panels, each row under its heading.

    Args:
        path: The PNG to write.
        rows: Heading and panels of each row.
        title: Title of the picture.

    Raises:
        ValueError: There are more kinds of attention than colours.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = dict.fromkeys(kind for _, panels in rows for panel in panels for kind in panel.values)
    if len(kinds) > len(_COLOURS):
        raise ValueError(
            f"expected at most {len(_COLOURS)} kinds of attention, got {len(kinds)}: {list(kinds)}"
        )
    colours = dict(zip(kinds, _COLOURS, strict=False))
    columns = max(len(panels) for _, panels in rows)
    figure = Figure(figsize=(4.2 * columns, 0.7 + 2.7 * len(rows)), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (heading, panels) in zip(parts, rows, strict=True):
        part.suptitle(heading, fontsize=11)
        for axes, panel in zip(part.subplots(1, columns, squeeze=False)[0], panels, strict=False):
            names, values = list(panel.values), list(panel.values.values())
            lengths = [value - panel.floor for value in values]
            bars = axes.barh(names, lengths, left=panel.floor, color=[colours[n] for n in names])
            axes.bar_label(bars, [panel.form.format(v) for v in values], padding=3, fontsize=10)
            axes.set_title(panel.title, fontsize=10)
            axes.set_xlim(panel.floor, panel.floor + 1.25 * (max(lengths) or 1.0))
            axes.invert_yaxis()
            axes.xaxis.set_visible(False)
            axes.spines[["top", "right", "bottom"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))
