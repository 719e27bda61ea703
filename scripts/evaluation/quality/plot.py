"""A picture of retained quality over visible tokens, and over time."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from evaluation.quality.arms import DENSE, RANDOM, WINDOW, Arm
from evaluation.quality.results import Results
from evaluation.quality.verdicts import closed_gap, mean_of_retrieval

# Dark enough on white, and distinguishable with colour blindness.
TRAINED_COLOUR, FREE_COLOUR, _CONTROL = "#0072b2", "#d55e00", "#888888"


def plot_quality(results: Results, path: Path) -> None:
    """Draw the retained quality of each arm.

    Args:
        results: Results of the finished parts.
        path: The PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), dpi=130, layout="constrained")
    answers, nats, times = figure.subplots(1, 3)
    dense_seconds = results.seconds(Arm(DENSE, DENSE))
    for arm in results.arms("retrieval"):
        share, visible = mean_of_retrieval(results, arm), results.visible(arm)
        if arm.run == DENSE or share is None:
            continue
        _mark(answers, arm, visible, share)
        seconds = results.seconds(arm)
        if seconds and dense_seconds:
            _mark(times, arm, seconds / dense_seconds, share)
    for arm in results.arms("nats"):
        gap = closed_gap(results, arm)
        if gap is not None and arm.run != DENSE:
            if math.isfinite(gap.high):
                error = [[gap.value - gap.low], [gap.high - gap.value]]
                nats.errorbar(results.visible(arm), gap.value, error, color=_colour(arm), capsize=3)
            _mark(nats, arm, results.visible(arm), gap.value)
    for axes, title in (
        (answers, "retained accuracy, mean over tasks that dense can do"),
        (nats, "gap from window to dense closed, nats in the second half"),
        (times, "retained accuracy"),
    ):
        axes.set_title(title, fontsize=9)
        axes.axhline(1.0, color="#bbbbbb", linewidth=0.8)
        axes.set_xlabel("tokens that a query can see")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    times.set_xlabel("time of a forward pass relative to dense")
    colours = "blue: trained with this attention, orange: trained densely"
    if results.settings.tuning is None:
        colours = "blue: a model as it is"
    figure.suptitle(
        f"{results.settings.length} tokens; {colours}, grey: controls without selection",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    FigureCanvasAgg(figure).print_png(str(aside))
    os.replace(aside, path)


def _mark(axes: Any, arm: Arm, x: float, y: float) -> None:
    axes.plot([x], [y], marker="o", color=_colour(arm), linestyle="none", markersize=6)
    axes.annotate(
        arm.run, (x, y), textcoords="offset points", xytext=(6, 4), fontsize=7, color=_colour(arm)
    )


def _colour(arm: Arm) -> str:
    if arm.run in (WINDOW, RANDOM):
        return _CONTROL
    return FREE_COLOUR if arm.tuned == DENSE else TRAINED_COLOUR
