"""All parts of a comparison, in the order in which a single process does them."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any

from evaluation.quality.arms import Arm, arms, attention_modes, trained
from evaluation.quality.parts import Part
from evaluation.quality.settings import RESERVED, QualitySettings

BASE, TEXT = "base", "text"
# Settings that change no result, only how the work is done.
_FREE_TUNING = ("workers", "compile", "checkpointing", "sequences_at_once")
_OF_GROUP = {
    "retrieval": ("tasks", "items"),
    "nats": ("windows",),
    "generation": ("programs",),
    "shares": ("share_rows",),
    "ruler": ("ruler_tasks", "ruler_lengths", "ruler_items"),
}
_ASKING = ("retrieval", "generation", "shares")


def plan(settings: QualitySettings) -> list[Part]:
    """Return all parts, each after those it needs."""
    base = _section(settings.base, "download")
    text = _section(settings.text)
    parts = [Part(BASE, (), {"base": base}), Part(TEXT, (BASE,), {"base": base, "text": text})]
    common = {"base": base, "text": text}
    if settings.tuning is None:
        for seed in settings.run.seeds:
            for arm in arms(settings):
                parts += _judged(settings, arm, seed, TEXT, common)
        return parts
    common["tuning"] = _section(settings.tuning, *_FREE_TUNING)
    for seed in settings.run.seeds:
        for name in trained(settings):
            depends_on = {**common, name: _attention(settings, name)}
            part = Part(f"train:{name}:{seed}", (BASE, TEXT), depends_on)
            parts.append(part)
            for arm in arms(settings):
                if arm.tuned == name:
                    parts += _judged(settings, arm, seed, part.name, depends_on)
    return parts


def chosen(parts: list[Part], patterns: list[str]) -> list[Part]:
    """Return the parts that match a pattern such as ``train:dense:*``, and those they need.

    Raises:
        ValueError: A pattern matches no part.
    """
    names: set[str] = set()
    for pattern in patterns:
        found = [part.name for part in parts if fnmatch.fnmatchcase(part.name, pattern)]
        if not found:
            raise ValueError(f"--parts: no part matches {pattern}; --list shows all")
        names.update(found)
    for part in reversed(parts):  # a part comes after those it needs
        if part.name in names:
            names.update(part.needs)
    return [part for part in parts if part.name in names]


def judge_name(arm: Arm, seed: int, group: str) -> str:
    """Return the name of the part that judges one group of one arm."""
    return f"judge:{arm.name}:{seed}:{group}"


def _judged(
    settings: QualitySettings, arm: Arm, seed: int, needs: str, common: dict[str, Any]
) -> list[Part]:
    parts = []
    for group in settings.judge.groups:
        if group == "shares" and arm.run in RESERVED:
            continue  # these select no blocks by scores
        if group == "nats" and settings.tuning is None and seed != settings.run.seeds[0]:
            continue  # the same model reads the same windows
        own = {name: getattr(settings.judge, name) for name in _OF_GROUP[group]}
        if settings.judge.questions is not None and group in _ASKING:
            own["questions"] = settings.judge.questions
        depends_on = {**common, "judge": {**own, "length": settings.length}}
        depends_on[arm.run] = _attention(settings, arm.run)
        parts.append(Part(judge_name(arm, seed, group), (needs,), depends_on))
    return parts


def _attention(settings: QualitySettings, name: str) -> Any:
    mode = attention_modes(settings)[name]
    attention, loss = mode.attention, mode.selection_loss
    if attention is None:
        return None
    # Only values that differ from the defaults, so that a new setting changes no existing part.
    values = {
        field.name: getattr(attention, field.name)
        for field in dataclasses.fields(attention)
        if getattr(attention, field.name) != field.default and field.name != "engine"
    }
    return values if loss is None else values | {"selection_loss": dataclasses.asdict(loss)}


def _section(section: Any, *without: str) -> dict[str, Any]:
    values = dataclasses.asdict(section)
    return {name: value for name, value in values.items() if name not in without}
