"""Tables of a comparison for the terminal."""

from __future__ import annotations

from evaluation.quality.arms import DENSE, WINDOW, Arm
from evaluation.quality.nats import buckets
from evaluation.quality.results import Results, group_of
from evaluation.quality.statistics import Interval
from evaluation.quality.verdicts import ABLE, closed_gap, has_gap, mean_of_ruler, retained_accuracy
from evaluation.table import format_table

_ANSWERS = ("retrieval", "generation", "ruler")  # groups with correct answers to count


def report(results: Results) -> str:
    """Return all tables that have results."""
    parts = [_answers(results), _kept(results), _nats(results), _shares(results)]
    found = [part for part in parts if part]
    return "\n\n".join(found) if found else "no results yet"


def _answers(results: Results) -> str:
    tasks = results.tasks()
    some = _that_answer(results)
    if not some:
        return ""
    rows = [
        [*_head(results, arm), *(_number(results.accuracy(task, arm)) for task in tasks)]
        for arm in some
    ]
    how = "trained->run where the two differ"
    if results.settings.tuning is None:
        how = "nothing was trained"
    return f"Accuracy at {results.settings.length} tokens; {how}\n\n" + format_table(
        ["variant", "visible", *tasks], rows
    )


def _kept(results: Results) -> str:
    rows: list[list[str]] = []
    remarks: list[str] = []
    dense = Arm(DENSE, DENSE)
    tasks = [task for task in results.tasks() if results.accuracy(task, dense) >= ABLE]
    ruler = ["mean of RULER"] if any(group_of(task) == "ruler" for task in tasks) else []
    unable = [task for task in results.tasks() if results.accuracy(task, dense) < ABLE]
    for arm in _that_answer(results):
        cells = []
        for task in tasks:
            found = retained_accuracy(results, arm, task)
            mark = ""
            if found is not None and found.remark:
                if found.remark not in remarks:
                    remarks.append(found.remark)
                mark = f" ({remarks.index(found.remark) + 1})"
            cells.append(_interval(found.share if found else None) + mark)
        if ruler:
            cells.append(_interval(mean_of_ruler(results, arm)))
        if any(cells):
            rows.append([*_head(results, arm), *cells])
    lines = [f"({number}) {remark}" for number, remark in enumerate(remarks, start=1)]
    if unable:
        lines.append(f"Left out, since dense answers less than half: {', '.join(unable)}")
    if rows and (alone := _of_one_training(results)):
        lines.append(f"Of one seed, without the variance between trainings: {', '.join(alone)}")
    notes = "\n".join(lines)
    if not rows:
        return notes
    title = "Accuracy over that of the dense model, with the 95 % interval over seeds and sequences"
    table = format_table(["variant", "visible", *tasks, *ruler], rows)
    return "\n\n".join(part for part in (title, table, notes) if part)


def _nats(results: Results) -> str:
    some = results.arms("nats")
    if not some:
        return ""
    names = [str(bucket) for bucket in buckets(results.settings.length)]
    rows = []
    for arm in some:
        means = [results.nats(name, arm) for name in names]
        cells = [f"{mean[0].mean():.3f}" if mean else "" for mean in means]
        rows.append([*_head(results, arm), *cells, _interval(closed_gap(results, arm))])
    table = format_table(["variant", "visible", *names, "gap window-dense closed"], rows)
    compared = [arm for arm in some if arm.run not in (DENSE, WINDOW)]
    without = [arm.name for arm in compared if has_gap(results, arm) is False]
    note = f"No gap, since the interval of window - dense reaches 0: {', '.join(without)}"
    title = "Nats per token of held-out text, by position"
    return "\n\n".join([title, table, *([note] if without else [])])


def _shares(results: Results) -> str:
    some = results.arms("shares")
    if not some:
        return ""
    kinds = ("attention", "attention_best", "attention_window", "needle", "needle_best")
    rows = []
    for arm in some:
        found = [
            results.found[arm, seed, "shares"]["layers"] for seed in results.seeds("shares", arm)
        ]
        cells = []
        for kind in kinds:
            values = [value for layers in found for value in layers.get(kind, {}).values()]
            cells.append(_number(sum(values) / len(values)) if values else "")
        rows.append([*_head(results, arm), *cells])
    return (
        "Fraction of dense attention in the selected blocks, in as many best blocks, and in the "
        "window; and of\nthe attention on needles (mean over layers; by layer in the CSV)\n\n"
        + format_table(["variant", "visible", *kinds], rows)
    )


def _of_one_training(results: Results) -> list[str]:
    """Return the names of arms other than dense that a single seed answers for."""
    if results.settings.tuning is None:
        return []
    return [
        arm.name
        for arm in _that_answer(results)
        if arm != Arm(DENSE, DENSE) and all(len(results.seeds(g, arm)) < 2 for g in _ANSWERS)
    ]


def _that_answer(results: Results) -> list[Arm]:
    """Return the arms for which a task is done."""
    return list(dict.fromkeys(arm for group in _ANSWERS for arm in results.arms(group)))


def _head(results: Results, arm: Arm) -> list[str]:
    return [arm.name, f"{results.visible(arm) / results.settings.length:.1%}"]


def _number(value: float) -> str:
    return "" if value != value else f"{value:.3f}"


def _interval(found: Interval | None) -> str:
    if found is None or found.value != found.value:
        return ""
    return f"{found.value:.3f} [{found.low:.3f} {found.high:.3f}]"
