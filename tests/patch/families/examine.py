"""Examine one model type: not built, refused, sound, or at fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedModel

import infllm_flex as ifx
from tests.patch.families.checks import CHECKS, UNDONE, Check
from tests.patch.families.observations import (
    Observation,
    Tensors,
    difference,
    sparse_and_dense,
)
from tests.patch.families.tiny import NotBuiltError, build
from tests.patch.models import EVERYTHING, SETTINGS

SOUND, REFUSED, NOT_BUILT, FAULT = "sound", "refused", "not built", "fault"


class Verdict(NamedTuple):
    """The outcome for a type.

    Attributes:
        result: One of the four words.
        why: Reason of a refusal, or why it was not built.
        sparse: How many attention layers are sparse.
        layers: Number of all attention layers.
        left: What `describe` says of the others.
        faults: Faults that were found, by check.
        not_asked: Failures of the unpatched model, by check.
    """

    result: str
    why: str = ""
    sparse: int = 0
    layers: int = 0
    left: str = ""
    faults: tuple[str, ...] = ()
    not_asked: tuple[str, ...] = ()


class _Failed(NamedTuple):
    """An observation that ended in an error."""

    words: str
    kind: type[Exception]

    @classmethod
    def of(cls, error: Exception) -> _Failed:
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return cls(words, type(error))


def examine(model_type: str) -> Verdict:
    """Build a model of a type, patch it, and compare it with itself unpatched."""
    try:
        ifx.patch_model(build(model_type), SETTINGS)
        model = build(model_type)
    except NotBuiltError as error:
        return Verdict(NOT_BUILT, str(error))
    except ifx.UnsupportedModelError as error:
        return Verdict(REFUSED, str(error))
    state = _state(model)
    undone = {name: _observe(model, observe) for name, observe in UNDONE.items()}
    references = {name: _references(model, check) for name, check in CHECKS.items()}
    ifx.patch_model(model, SETTINGS)
    rows = ifx.describe(model)
    left = Counter(row.status for row in rows if not row.sparse)
    faults, not_asked = [], []
    for name, check in CHECKS.items():
        for fault in _judge(model, check, references[name]):
            (not_asked if fault.startswith("not asked") else faults).append(f"{name}: {fault}")
    faults += [f"sparse: {fault}" for fault in _never_sparse(model)]
    ifx.unpatch_model(model)
    faults += [f"undone: {fault}" for fault in _changes(state, _state(model))]
    for name, before in undone.items():
        if isinstance(before, list):
            after = _observe(model, UNDONE[name])
            fault = after.words if isinstance(after, _Failed) else difference(after, before, True)
            faults += [] if fault is None else [f"undone, {name}: {fault}"]
    return Verdict(
        FAULT if faults else SOUND,
        sparse=sum(row.sparse for row in rows),
        layers=len(rows),
        left="; ".join(f"{count} x {status}" for status, count in left.items()),
        faults=tuple(faults),
        not_asked=tuple(not_asked),
    )


def _observe(model: PreTrainedModel, observe: Observation) -> Tensors | _Failed:
    try:
        return observe(model)
    except Exception as error:
        return _Failed.of(error)


def _references(model: PreTrainedModel, check: Check) -> list[Tensors | _Failed]:
    """The alternatives of a check; the failure alone, if the unpatched model cannot do it."""
    if check.itself:
        return []
    own = _observe(model, check.observe)
    if isinstance(own, _Failed) or not check.expect:
        return [own]
    return [_observe(model, expect) for expect in check.expect]


def _judge(
    model: PreTrainedModel, check: Check, references: list[Tensors | _Failed]
) -> Iterator[str]:
    if check.itself:
        ifx.patch_model(model, {**EVERYTHING, "dense_len": check.settings["dense_len"]})
        theirs = [_observe(model, expect) for expect in check.expect]
        if (fault := _compare(_observe(model, check.observe), theirs, False)) is not None:
            yield f"not asked: nor does it hold with every block selected: {fault}"
            return
        ifx.patch_model(model, check.settings)
        references = [_observe(model, expect) for expect in check.expect]
    failed = [reference for reference in references if isinstance(reference, _Failed)]
    if len(failed) == len(references):
        yield f"not asked: unpatched {failed[0].words}"
        return
    ifx.patch_model(model, check.settings)
    ours = _observe(model, check.observe)
    if (fault := _compare(ours, references, check.exact)) is not None:
        refused = isinstance(ours, _Failed) and issubclass(ours.kind, check.may_refuse)
        yield f"not asked: refused with {fault}" if refused else fault


def _compare(
    ours: Tensors | _Failed, references: list[Tensors | _Failed], exact: bool
) -> str | None:
    """How an observation differs from the first of the alternatives; None where it is one."""
    if isinstance(ours, _Failed):
        return ours.words
    differences = [difference(ours, r, exact) for r in references if isinstance(r, list)]
    return None if None in differences else differences[0] if differences else "nothing to compare"


def _never_sparse(model: PreTrainedModel) -> Iterator[str]:
    """A model that stays dense would pass all other checks."""
    ifx.patch_model(model, SETTINGS)
    try:
        same = difference(*sparse_and_dense(model), exact=False) is None
    except Exception as error:
        yield _Failed.of(error).words
    else:
        if same:
            yield "a long sequence gives what it gives dense"


def _state(model: PreTrainedModel) -> dict[str, Any]:
    """Classes and attributes of all modules, and what the configuration says."""
    modules = {n: (type(m), sorted(vars(m))) for n, m in model.named_modules()}
    return {**modules, "config": model.config.to_dict(), "": model.config._attn_implementation}


def _changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for name in before.keys() | after.keys():
        if before.get(name) != after.get(name):
            yield f"{name or 'the attention implementation'} is not as it was"
