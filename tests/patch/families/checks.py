"""Properties of a model that patching must keep, each compared with the unpatched model.

A check observes a model before and after it is patched. A patched model is not asked for anything
that it does not do unpatched: a class without a cache, say, is asked for none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import infllm_flex as ifx
from tests.patch.families.observations import (
    Observation,
    alone,
    as_unpatched,
    block_diagonal,
    generation,
    in_chunks,
    in_whole,
    logits,
    packed,
    padded_across,
    padded_below,
    padded_rows,
    rows_alone,
    tokens,
    training,
)
from tests.patch.models import EVERYTHING, LONG, SETTINGS, SHORT


class Check(NamedTuple):
    """One property.

    Attributes:
        settings: Settings of the patched model.
        observe: Makes the compared value.
        expect: Make the values that it may equal, each an alternative; none for ``observe``
            unpatched.
        exact: Whether every bit must be the same.
        itself: Whether ``expect`` is of the patched model, too. Asked of models that hold it with
            every block selected.
        may_refuse: By which errors the patched model may say that it does not serve this.
    """

    settings: dict[str, Any]
    observe: Observation
    expect: tuple[Observation, ...] = ()
    exact: bool = False
    itself: bool = False
    may_refuse: tuple[type[Exception], ...] = ()


_NOT_PACKED = (NotImplementedError, ValueError)
_NOT_PADDED = (ifx.UnsupportedModelError,)  # by layers that call F.scaled_dot_product_attention


def _packing(lengths: tuple[int, ...]) -> dict[str, Check]:
    name = f"{max(lengths)} tokens"
    checks = {}
    for argument, *how in (
        ("cu_seq_lens", True),
        ("position_ids", False),
        ("position_ids with a cache", False, True),
    ):
        ours = packed(lengths, *how)
        # transformers looks for documents in position_ids only if there is no cache.
        apart = as_unpatched(packed(lengths, how[0]))
        expected = (alone(lengths), block_diagonal(lengths), as_unpatched(ours), apart)
        every = {**EVERYTHING, "topk": -(-sum(lengths) // EVERYTHING["block_size"])}
        checks[f"packed by {argument}, {name}"] = Check(
            every, ours, expected, may_refuse=_NOT_PACKED
        )
        if max(lengths) >= SETTINGS["dense_len"]:
            checks[f"packed by {argument}, sparse"] = Check(
                SETTINGS, ours, (alone(lengths),), itself=True
            )
    return checks


_STEPS = (90, *[1] * 9)
_CHUNKS = (80, 30, 1, 9, 1)
_ALWAYS = {**SETTINGS, "dense_len": -1}
CHECKS: dict[str, Check] = {
    "below dense_len": Check(SETTINGS, lambda m: training(m, tokens(m, SHORT)), exact=True),
    "inference, below": Check(SETTINGS, lambda m: [logits(m, tokens(m, SHORT))], exact=True),
    "left-padded, below": Check(SETTINGS, padded_below(True), exact=True),
    "right-padded, below": Check(SETTINGS, padded_below(False), exact=True),
    "generation, below": Check(SETTINGS, generation(60, 5), exact=True),
    "padded generation, below": Check(SETTINGS, generation(60, 5, left=True), exact=True),
    "every block": Check(EVERYTHING, lambda m: training(m, tokens(m, LONG))),
    "left-padded": Check(EVERYTHING, padded_across(True), may_refuse=_NOT_PADDED),
    "right-padded": Check(EVERYTHING, padded_across(False), may_refuse=_NOT_PADDED),
    "steps": Check(EVERYTHING, in_chunks(*_STEPS), (in_whole(*_STEPS), in_chunks(*_STEPS))),
    "chunks": Check(EVERYTHING, in_chunks(*_CHUNKS), (in_whole(*_CHUNKS), in_chunks(*_CHUNKS))),
    "padded chunks": Check(EVERYTHING, in_chunks(*_CHUNKS, left=16), may_refuse=_NOT_PADDED),
    "generation": Check(EVERYTHING, generation(90, 9)),
    "padded generation": Check(EVERYTHING, generation(90, 9, left=True), may_refuse=_NOT_PADDED),
    **_packing((40, 23, 30)),
    **_packing((110, 18, 104)),
    "sparse steps": Check(_ALWAYS, in_chunks(*_STEPS), (in_whole(*_STEPS),), itself=True),
    "sparse chunks": Check(_ALWAYS, in_chunks(*_CHUNKS), (in_whole(*_CHUNKS),), itself=True),
    **{
        f"{side}-padded, sparse": Check(
            SETTINGS,
            padded_rows(left),
            (rows_alone(left, True), rows_alone(left, False)),
            itself=True,
        )
        for side, left in (("left", True), ("right", False))
    },
}
UNDONE: dict[str, Observation] = {
    name: CHECKS[name].observe for name in ("below dense_len", "every block", "generation, below")
}
