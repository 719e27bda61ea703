"""Serve the calls of ``F.scaled_dot_product_attention`` that one layer makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from infllm_flex.patch.errors import UnsupportedModelError
from infllm_flex.patch.layer_state import PatchedLayer
from infllm_flex.patch.sdpa_calls import SdpaCall, attend
from infllm_flex_ops import torch_private

_Result = TypeVar("_Result")
_SDPA = F.scaled_dot_product_attention
_UNFLATTEN = torch.Tensor.unflatten


class SdpaInterceptor(TorchFunctionMode):
    """While active in this thread, SDPA calls are sparse where the layer says so.

    Each call of a layer makes its own, so that the count of calls is no state of the model. Another
    thread, or a recomputation under activation checkpointing, could disturb such a state.

    Attributes:
        calls: SDPA calls seen so far.
    """

    def __init__(self, layer: PatchedLayer, kv_heads: int | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.kv_heads = kv_heads
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Every torch function of the layer passes here, so the common path is short.
        kwargs = kwargs or {}
        if func is _SDPA:
            self.calls += 1
            out = attend(self.layer, SdpaCall(*args, **kwargs), self.kv_heads)
            if out is not None:
                return out
        elif func is _UNFLATTEN:
            # The method is Python code with a `super()` that Dynamo cannot trace inside a mode.
            func = torch.unflatten
        return func(*args, **kwargs)


def run_intercepted(
    layer: PatchedLayer,
    owner: str,
    function: Callable[..., _Result],
    /,
    *args: Any,
    kv_heads: int | None = None,
    **kwargs: Any,
) -> _Result:
    """Call a function with its SDPA calls intercepted, and require that there is at least one.

    Args:
        layer: The record of the layer.
        owner: Name of the function's class, for the error.
        function: The layer's own code.
        args: Its arguments.
        kv_heads: Key/value heads, where the caller knows better than the record.
        kwargs: Its keywords.

    Raises:
        UnsupportedModelError: The function attended without ``F.scaled_dot_product_attention``.
    """
    mode = SdpaInterceptor(layer, kv_heads)
    if torch.compiler.is_dynamo_compiling():
        # Dynamo refuses side effects inside a checkpointed region, and entering a mode counts as
        # one. This mode ends with the region, so the check is lifted for it alone.
        torch_private.without_side_effect_check(mode.__enter__)
        try:
            out = function(*args, **kwargs)
        finally:
            torch_private.without_side_effect_check(mode.__exit__, None, None, None)
    else:
        with mode:
            out = function(*args, **kwargs)
    if mode.calls == 0:
        raise UnsupportedModelError(
            f"{owner} attended without torch.nn.functional.scaled_dot_product_attention (softmax "
            "written by hand, or another kernel), so its attention cannot be made sparse from "
            "outside: call infllm_flex.infllm_attention there, or name other attention_modules"
        )
    return out
