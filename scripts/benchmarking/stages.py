"""An engine's two steps, timed separately: build block lists, and attend over them."""

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
        build_lists: Builds the lists, in every call.
        attend: Attends over lists that were built once.
    """

    build_lists: Callable[[], Any]
    attend: Callable[[], Tensor]


def engine_steps(qkv: QKV, selected: Tensor, config: InfLLMConfig) -> Steps:
    """Split attention over ``selected`` blocks into its two steps.

    Args:
        qkv: One sequence per row; the tensors collect gradients where a backward follows.
        selected: int32 ``[B, Hkv, Sq, K]``.
        config: Sparsity settings, ``engine`` among them.
    --
    """
    query, key, value = qkv
    engine = choose_engine(query, key, value, config, resolve_scale(query, None))
    lists = engine.build_lists(selected, key)
    return Steps(
        lambda: engine.build_lists(selected, key),
        lambda: engine.attend(query, key, value, lists),
    )
