"""The adapter for any module whose code calls ``F.scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Any

from torch import nn

from infllm_flex.patch import code_inspection
from infllm_flex.patch.class_swap import runs_own_forward
from infllm_flex.patch.layer_state import PatchedLayer, get_layer
from infllm_flex.patch.sdpa_interception import run_intercepted
from infllm_flex.patch.skip_reasons import (
    FORWARD_ON_INSTANCE,
    LEARNED_MASK,
    NOT_CAUSAL,
    OWN_INDEXER,
)

NAME = "F.scaled_dot_product_attention"


def recognises(module: nn.Module) -> bool:
    """Whether the module is an attention layer of this kind."""
    return code_inspection.calls_sdpa(module)


def find_skip_reason(module: nn.Module) -> str | None:
    """Why the layer cannot be sparse, as far as its code tells; None where nothing forbids it.

    The first forward tells the rest: a call that is not causal, or no call at all, is an error.
    """
    if code_inspection.never_causal(module):
        return NOT_CAUSAL
    if code_inspection.learns_mask(module):
        return LEARNED_MASK
    if code_inspection.mentions(module, "alibi") and _alibi_is_on(module):
        return "ALiBi"
    if getattr(module, "indexer", None) is not None:
        return OWN_INDEXER
    return swap_skip_reason(module)


def swap_skip_reason(module: nn.Module) -> str | None:
    """Why another class would have no effect on the module; None where it would."""
    return None if runs_own_forward(module) else FORWARD_ON_INSTANCE


def _alibi_is_on(module: nn.Module) -> bool:
    places: tuple[Any, ...] = (module, getattr(module, "config", None))
    for place in places:
        if hasattr(place, "alibi"):
            return place.alibi is not None and place.alibi is not False
    return True


def overrides(original: Any) -> dict[str, Any]:
    """Members of the swapped class: the whole forward is overridden."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layer = require_layer(self)
        if layer.is_in_dense_context():
            return original.forward(self, *args, **kwargs)
        return run_intercepted(layer, original.__name__, original.forward, self, *args, **kwargs)

    return {"forward": forward}


def require_layer(module: nn.Module) -> PatchedLayer:
    """The record of a module of a swapped class, which always has one."""
    layer = get_layer(module)
    assert layer is not None
    return layer
