"""The building of block lists apart from the attention over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from benchmarking.inputs import QKV
from infllm_flex.config import InfLLMConfig
from infllm_flex.engines.choose import choose_engine
from infllm_flex.validation import resolve_scale


class Steps(NamedTuple):
    """The two steps of an engine.

    Attributes:
        build_lists: Builds the lists anew.
        attend: Attends over lists built beforehand.
    """

    build_lists: Callable[[], Any]
    attend: Callable[[], Tensor]


def engine_steps(qkv: QKV, selected: Tensor, config: InfLLMConfig) -> Steps:
    """Split attention over ``selected`` blocks into its steps.

    Args:
        qkv: Queries, keys and values of one sequence per row; with gradients if a backward follows.
        selected: int32 ``[B, Hkv, Sq, K]``.
        config: Sparsity settings, which choose the engine.
    """
    query, key, value = qkv
    engine = choose_engine(query, key, value, config, resolve_scale(query, None))
    lists = engine.build_lists(selected, key)
    return Steps(
        lambda: engine.build_lists(selected, key),
        lambda: engine.attend(query, key, value, lists),
    )
