"""Refuse models that cannot be patched, on one line: what was found, tried, and what to do next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import nn

from infllm_flex.patch import code_inspection
from infllm_flex.patch.class_swap import original_class
from infllm_flex.patch.discovery import AttentionModule
from infllm_flex.patch.errors import UnsupportedModelError
from infllm_flex.patch.skip_reasons import advice_for
from infllm_flex_ops import torch_private

_TRIED = (
    "tried the registry of transformers, the attention of torchtune, litgpt, torchtitan and "
    "x-transformers, and calls of F.scaled_dot_product_attention; name the layers by "
    "attention_modules=, or, for causal full attention written by hand, call "
    "infllm_flex.infllm_attention in the model's own forward"
)


def require_module(model: object) -> None:
    """Raise a TypeError for anything that is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def require_not_traced(function: str) -> None:
    """Raise a RuntimeError inside any kind of tracing."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    if tracing or torch_private.is_traced_otherwise() or torch.compiler.is_compiling():
        raise RuntimeError(
            f"{function} was called while the model is being traced; call it before "
            "torch.compile, torch.export or torch.jit.trace run the model"
        )


def reject_scripted(model: nn.Module) -> None:
    """Raise an UnsupportedModelError for TorchScript."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{type(model).__name__} is compiled TorchScript, whose code cannot be changed; "
            "patch the Python model before torch.jit sees it"
        )


def reject_unsupported(
    model: nn.Module, layers: Mapping[str, AttentionModule], named: Collection[nn.Module] | None
) -> None:
    """Raise an UnsupportedModelError unless some layer can be sparse, and every named one."""
    if named is not None:
        for name, found in layers.items():
            if found.module in named and found.skip_reason is not None:
                text = "; ".join([found.skip_reason, *advice_for([found.skip_reason])])
                raise UnsupportedModelError(f"{name} cannot be sparse: {text}")
    if any(found.skip_reason is None for found in layers.values()):
        return
    found_text = _describe(layers) if layers else _describe_others(model)
    advice = advice_for([str(found.skip_reason) for found in layers.values()])
    if any(found.overrides is not None for found in layers.values()):  # recognised by code alone
        advice.append("name the layers by attention_modules= where this is not so")
    what_to_do = "; ".join(advice or [_TRIED])
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot be patched: found {found_text}; {what_to_do}"
    )


def _describe(layers: Mapping[str, AttentionModule]) -> str:
    counts = Counter(str(found.skip_reason) for found in layers.values())
    return f"{len(layers)} attention layers, none of which can be sparse: " + ", ".join(
        f"{count} x {reason}" for reason, count in counts.items()
    )


def _describe_others(model: nn.Module) -> str:
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            return "no attention layer but torch.nn.MultiheadAttention, whose kernel is its own"
        if (name := code_inspection.other_attention(module)) is not None:
            return f"no attention layer but {original_class(module).__name__}, which calls {name}"
    return "no attention layer (a model without attention has nothing to make sparse)"
