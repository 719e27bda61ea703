"""Retained quality against visible tokens, and against time, as a PNG."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from evaluation.quality.arms import DENSE, RANDOM, WINDOW, Arm
from evaluation.quality.results import Results
from evaluation.quality.verdicts import closed, mean_kept

# Dark enough on white, and apart for colour-blind eyes.
_TRAINED, _FREE, _CONTROL = "#0072b2", "#d55e00", "#888888"


def plot_quality(results: Results, path: Path) -> None:
    """Draw what each variant keeps.

    Args:
        results: What is done.
        path: The PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), dpi=130, layout="constrained")
    answers, nats, times = figure.subplots(1, 3)
    dense_seconds = results.seconds(Arm(DENSE, DENSE))
    for arm in results.arms("retrieval"):
        share, visible = mean_kept(results, arm), results.visible(arm)
        if arm.run == DENSE or share is None:
            continue
        _mark(answers, arm, visible, share)
        seconds = results.seconds(arm)
        if seconds and dense_seconds:
            _mark(times, arm, seconds / dense_seconds, share)
    for arm in results.arms("nats"):
        gap = closed(results, arm)
        if gap is not None and arm.run != DENSE:
            error = [[gap.value - gap.low], [gap.high - gap.value]]
            nats.errorbar(results.visible(arm), gap.value, error, color=_colour(arm), capsize=3)
            _mark(nats, arm, results.visible(arm), gap.value)
    for axes, title in (
        (answers, "right answers kept, mean over tasks that dense can do"),
        (nats, "gap from window to dense closed, nats in the second half"),
        (times, "right answers kept"),
    ):
        axes.set_title(title, fontsize=9)
        axes.axhline(1.0, color="#bbbbbb", linewidth=0.8)
        axes.set_xlabel("tokens that a query sees at most")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    times.set_xlabel("time of a forward pass over that of dense")
    figure.suptitle(
        f"{results.settings.length} tokens; blue: trained so, orange: trained densely, grey: "
        "controls without a choice",
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
    return _FREE if arm.tuned == DENSE else _TRAINED
