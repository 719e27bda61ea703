"""Quality kept and time taken by the same settings, from the CSVs of two commands."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarking.report import SHAPE, Row, speed_ups_of_methods
from evaluation.quality.arms import DENSE
from evaluation.quality.plot import FREE_COLOUR, TRAINED_COLOUR
from evaluation.table import format_table

_Arm = tuple[str, str]  # attention in tuning, and in evaluation
_Answers = dict[tuple[str, str], int]  # correct ones by seed and task


class Kept(NamedTuple):
    """Share of the dense model's correct answers: of all seeds, of the worst and of the best."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """One attention setting.

    Attributes:
        settings: Its name in both files.
        is_trained: Whether the model was tuned with it; else it was tuned densely.
        kept: Share of the dense model's correct answers.
        speed_up: By length in tokens, dense attention's time over that of this setting.
    """

    settings: str
    is_trained: bool
    kept: Kept
    speed_up: Mapping[int, float]

    @property
    def tuned(self) -> str:
        """How the model was tuned, in words."""
        return "with it" if self.is_trained else "densely"


def points(
    quality: Sequence[Row], times: Sequence[Row], tasks: Sequence[str], default: str
) -> list[Point]:
    """Join both files by the name of the settings.

    Args:
        quality: Rows of ``scripts/quality.py``.
        times: Rows of ``scripts/benchmark.py`` for one shape of heads, forward.
        tasks: Tasks whose answers are counted together.
        default: Name in ``quality`` of the settings that ``times`` has under ``attention:``.

    Returns:
        Settings that both files have, in the order of ``quality``.

    Raises:
        ValueError: They share no settings, or a task is missing.
    """
    missing = sorted(set(tasks) - {row["task"] for row in quality})
    if missing:
        raise ValueError(f"expected answers to {', '.join(tasks)}, got none to {missing[0]}")
    speed_ups, right = _speed_ups(times, default), _right_answers(quality, tasks)
    found = []
    for (tuned, run), ours in right.items():
        kept = _kept(ours, right.get((DENSE, DENSE), {}))
        if run in speed_ups and kept is not None and tuned in (DENSE, run):
            found.append(Point(run, tuned == run, kept, speed_ups[run]))
    if not found:
        raise ValueError(
            f"expected settings that both files have, got {', '.join(speed_ups) or 'no times'}: "
            "the variants of both configs need the same names"
        )
    return found


def _right_answers(quality: Iterable[Row], tasks: Sequence[str]) -> dict[_Arm, _Answers]:
    right: dict[_Arm, _Answers] = {}
    for row in quality:
        if row["task"] in tasks:
            mine = right.setdefault((row["tuned"], row["run"]), {})
            mine[row["seed"], row["task"]] = int(row["hits"])
    return right


def _kept(ours: _Answers, dense: _Answers) -> Kept | None:
    """Return the share over what both were asked; None where that is nothing."""
    both = ours.keys() & dense.keys()

    def share(some: Collection[tuple[str, str]]) -> float:
        of = sum(dense[key] for key in some)
        return sum(ours[key] for key in some) / of if of else math.nan

    by_seed = [
        share([key for key in both if key[0] == seed]) for seed in {seed for seed, _ in both}
    ]
    return Kept(share(both), min(by_seed), max(by_seed)) if both else None


def _speed_ups(times: Sequence[Row], default: str) -> dict[str, dict[int, float]]:
    forward = [row for row in times if row["mode"] == "forward"]
    shapes = {(row["Hq"], row["Hkv"], row["D"]) for row in forward}
    if len(shapes) > 1:
        found = ", ".join("/".join(shape[:2]) for shape in sorted(shapes))
        raise ValueError(f"expected times of one pair of heads, got {found}: choose by --heads")
    ratios: dict[str, dict[int, float]] = {}
    for shape, of_shape in speed_ups_of_methods(forward).items():
        length = int(dict(zip(SHAPE, shape, strict=True))["S"])
        for method, ratio in of_shape.items():
            ratios.setdefault(method.settings or default, {}).setdefault(length, ratio)
    return ratios


def front(some: Sequence[Point], length: int) -> list[Point]:
    """Return the points that no other one beats in both quality and speed at a length."""
    at = [(point.kept.value, point.speed_up.get(length, 0.0)) for point in some]
    return [
        point
        for point, (kept, fast) in zip(some, at, strict=True)
        if fast and not any(k >= kept and f >= fast and (k, f) != (kept, fast) for k, f in at)
    ]


def lengths(some: Iterable[Point]) -> list[int]:
    """Return all lengths with times."""
    return sorted({length for point in some for length in point.speed_up})


def table(some: Sequence[Point]) -> str:
    """Return a line for each point; * marks the speed-ups of points on the front."""
    columns = lengths(some)
    on_front = {length: front(some, length) for length in columns}
    rows = []
    for point in some:
        kept = f"{point.kept.value:.3f} ({point.kept.low:.3f} to {point.kept.high:.3f})"
        cells = [
            f"{point.speed_up[n]:.2f}{'*' if point in on_front[n] else ''}"
            if n in point.speed_up
            else ""
            for n in columns
        ]
        rows.append([point.settings, point.tuned, kept, *cells])
    header = ["settings", "tuned", "kept (seeds)", *(f"x dense, {n}" for n in columns)]
    return format_table(header, rows)


def plot(path: Path, some: Sequence[Point], title: str) -> None:
    """Draw quality kept over the speed-up, a panel for each length, and the front.

    Args:
        path: The PNG to write.
        some: The points.
        title: Title of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = lengths(some)
    figure = Figure(figsize=(4.6 * len(columns), 4.6), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, length in zip(panels, columns, strict=True):
        _panel(axes, [point for point in some if length in point.speed_up], length)
        axes.set_title(f"{length} tokens", fontsize=10)
        axes.set_xlabel("times as fast as dense attention")
        axes.spines[["top", "right"]].set_visible(False)
        axes.axhline(1.0, color="#bbbbbb", linewidth=0.8)
        axes.axvline(1.0, color="#bbbbbb", linewidth=0.8)
    panels[0].set_ylabel("kept of the dense model's correct answers")
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _panel(axes: Any, some: Sequence[Point], length: int) -> None:
    for is_trained, colour in ((True, TRAINED_COLOUR), (False, FREE_COLOUR)):
        mine = [point for point in some if point.is_trained == is_trained]
        best = sorted(front(mine, length), key=lambda point: point.speed_up[length])
        xs, ys = ([p.speed_up[length] for p in best], [p.kept.value for p in best])
        axes.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.6)
        for index, point in enumerate(mine):
            x, kept = point.speed_up[length], point.kept
            error = [[kept.value - kept.low], [kept.high - kept.value]]
            axes.errorbar(x, kept.value, error, color=colour, marker="o", markersize=5, capsize=2)
            axes.annotate(
                point.settings,
                (x, kept.value),
                textcoords="offset points",
                xytext=(5, (5, -11)[index % 2]),  # neighbours' names do not overlap
                fontsize=7,
                color=colour,
            )
