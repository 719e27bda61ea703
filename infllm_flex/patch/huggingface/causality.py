"""Which attention layers attend causally to their own sequence, as far as their code says.

transformers takes a layer without ``is_causal`` as causal wherever it gets no mask. Encoders and
cross-attention that always get one leave the attribute out, and some towers set it to True. A cache
tells them apart: a layer that generates takes one, and so does the model around it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection
from typing import Any

from torch import nn

from infllm_flex.patch.class_swap import original_class
from infllm_flex.patch.huggingface import transformers_private
from infllm_flex.patch.skip_reasons import (
    CROSS_ATTENTION,
    NOT_CAUSAL,
    OTHER_SEQUENCE,
    UNDECLARED,
)


def find_skip_reason(module: nn.Module) -> str | None:
    """Why a layer is no causal attention to its own sequence; None where it is, or may be."""
    config: Any = module.config
    declared = getattr(module, "is_causal", None)
    if (declared is not None and not declared) or not getattr(config, "is_causal", True):
        return NOT_CAUSAL
    arguments = _arguments(original_class(module))
    takes_cache = transformers_private.takes_cache(arguments)
    takes_others = transformers_private.takes_other_states(arguments)
    if getattr(module, "is_cross_attention", False) or (declared is None and takes_others):
        return CROSS_ATTENTION
    # A decoder's class may serve both kinds: it takes a cache, and says of each layer what it is.
    if takes_others and not takes_cache:
        return OTHER_SEQUENCE
    if declared is None and not takes_cache:
        return UNDECLARED
    return None


def find_without_cache(model: nn.Module, names: Collection[str]) -> set[str]:
    """The layers among ``names`` that no cache reaches.

    A cache reaches a layer if the layer's forward takes one, and that of the innermost transformers
    model around it. Layers inside no transformers model are left out.
    """
    models = {n: m for n, m in model.named_modules() if transformers_private.is_model(m)}
    found = set()
    for name in names:
        around = next((models[end] for end in _parents(name) if end in models), None)
        if around is not None and not (
            _takes_cache(model.get_submodule(name)) and _takes_cache(around)
        ):
            found.add(name)
    return found


def _parents(name: str) -> list[str]:
    """Names of the modules around a module, the innermost first, and the root last."""
    pieces = name.split(".")
    return [".".join(pieces[:end]) for end in reversed(range(len(pieces)))]


def _takes_cache(module: nn.Module) -> bool:
    return transformers_private.takes_cache(_arguments(original_class(module)))


@functools.cache
def _arguments(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(inspect.unwrap(cls.forward)).parameters)
