"""All parts of a comparison, in the order in which one process does them."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any

from evaluation.quality.arms import Arm, arms, trained, ways
from evaluation.quality.parts import Part
from evaluation.quality.settings import RESERVED, QualitySettings

BASE, TEXT = "base", "text"
# What changes no result: how work is split.
_FREE_TUNING = ("workers", "compile", "checkpointing", "sequences_at_once")
_OF_GROUP = {
    "retrieval": ("tasks", "items"),
    "nats": ("windows",),
    "generation": ("programs",),
    "shares": ("share_rows",),
    "ruler": ("ruler_tasks", "ruler_lengths", "ruler_items"),
}


def plan(settings: QualitySettings) -> list[Part]:
    """The parts; every one stands behind those it needs."""
    base = _section(settings.base, "download")
    text = _section(settings.text)
    parts = [Part(BASE, (), {"base": base}), Part(TEXT, (BASE,), {"base": base, "text": text})]
    common = {"base": base, "text": text, "tuning": _section(settings.tuning, *_FREE_TUNING)}
    models: dict[tuple[str, int], Part] = {}
    for seed in settings.run.seeds:
        for name in trained(settings):
            part = Part(
                f"train:{name}:{seed}", (BASE, TEXT), {**common, f"{name}": _way(settings, name)}
            )
            models[name, seed] = part
            parts.append(part)
            for arm in arms(settings):
                if arm.tuned == name:
                    parts += _judged(settings, arm, seed, part)
    return parts


def chosen(parts: list[Part], patterns: list[str]) -> list[Part]:
    """Those of the parts that a pattern names, as ``train:dense:*``, and what they need.

    Raises:
        ValueError: A pattern names none.
    """
    names: set[str] = set()
    for pattern in patterns:
        found = [part.name for part in parts if fnmatch.fnmatchcase(part.name, pattern)]
        if not found:
            raise ValueError(f"--parts: none is called {pattern}; --list shows all")
        names.update(found)
    for part in reversed(parts):  # what a part needs stands before it
        if part.name in names:
            names.update(part.needs)
    return [part for part in parts if part.name in names]


def judge_name(arm: Arm, seed: int, group: str) -> str:
    """The name of the part that judges one group of one arm."""
    return f"judge:{arm.name}:{seed}:{group}"


def _judged(settings: QualitySettings, arm: Arm, seed: int, model: Part) -> list[Part]:
    parts = []
    for group in settings.judge.groups:
        if group == "shares" and arm.run in RESERVED:
            continue  # nothing is chosen there
        own = {name: getattr(settings.judge, name) for name in _OF_GROUP[group]}
        how = {**model.settings, "judge": {**own, "length": settings.length}}
        how[arm.run] = _way(settings, arm.run)
        parts.append(Part(judge_name(arm, seed, group), (model.name,), how))
    return parts


def _way(settings: QualitySettings, name: str) -> Any:
    attention = ways(settings)[name].attention
    if attention is None:
        return None
    # As far as it differs from the defaults: settings that come later change nothing.
    return {
        field.name: getattr(attention, field.name)
        for field in dataclasses.fields(attention)
        if getattr(attention, field.name) != field.default and field.name != "engine"
    }


def _section(section: Any, *without: str) -> dict[str, Any]:
    values = dataclasses.asdict(section)
    return {name: value for name, value in values.items() if name not in without}
