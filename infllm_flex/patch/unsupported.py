"""What cannot be patched, said on one line: what was found, what was tried, what to do next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from infllm_flex.patch import code_inspection as code
from infllm_flex.patch.class_swap import original_class
from infllm_flex.patch.discovery import Found
from infllm_flex.patch.errors import UnsupportedModelError

_TRIED = (
    "tried the registry of transformers, the attention of torchtune, litgpt, torchtitan and "
    "x-transformers, and calls of F.scaled_dot_product_attention; name the layers by "
    "attention_modules=, or, for causal full attention written by hand, call "
    "infllm_flex.infllm_attention in the model's own forward"
)

# What to do about a reason, by how it begins.
_ADVICE = (
    (
        "sliding window",
        "a window over the keys stays dense; where the model may attend to all of them, build it "
        "with sliding_window=None, or with 'full_attention' among its layer_types",
    ),
    ("not causal", "only causal self-attention can be sparse"),
    (
        "logits soft-capped",
        "sparse attention caps no logits; where the model may do without, set the cap to None "
        "in its config",
    ),
    ("learned attention sinks", "sparse attention has no sinks: such a model stays dense"),
    ("a position bias", "sparse attention adds nothing to its logits: such a model stays dense"),
    ("a mask that", "sparse attention adds nothing to its logits: such a model stays dense"),
    ("values of", "sparse attention needs values as wide as keys: such a model stays dense"),
    ("heads of", "sparse attention serves heads of up to 256: wider ones stay dense"),
    ("keys of another model", "a drafter stays dense: patch the model that it drafts for"),
    ("indexed attention", "the model selects its keys itself: it is sparse already"),
    ("the model's own sparse indexer", "the model selects its keys itself: it is sparse already"),
    (
        "a forward set on the instance",
        "remove it before patching, or call infllm_flex.infllm_attention in it",
    ),
    (
        "attn_implementation=",
        "call model.set_attn_implementation('sdpa') before patching",
    ),
)


def require_module(model: object) -> None:
    """Raise a TypeError for anything that is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def require_not_traced(function: str) -> None:
    """Raise a RuntimeError inside any kind of tracing."""
    tracing = torch._C._is_tracing() or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
    if tracing or torch.compiler.is_compiling():
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
    model: nn.Module, layers: Mapping[str, Found], named: Collection[nn.Module] | None
) -> None:
    """Raise an UnsupportedModelError unless some layer can be sparse, and every named one."""
    if named is not None:
        for name, found in layers.items():
            if found.module in named and found.left is not None:
                reason = "; ".join([found.left, *_advise([found.left])])
                raise UnsupportedModelError(f"{name} cannot be sparse: {reason}")
    if any(found.left is None for found in layers.values()):
        return
    found_text = _describe(layers) if layers else _describe_others(model)
    advice = _advise([str(found.left) for found in layers.values()])
    if any(found.members is not None for found in layers.values()):  # told by their code alone
        advice.append("name the layers by attention_modules= where this is not so")
    what_to_do = "; ".join(advice or [_TRIED])
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot be patched: found {found_text}; {what_to_do}"
    )


def _advise(reasons: Iterable[str]) -> list[str]:
    """What to do about reasons, each piece of advice once."""
    found = (words for reason in reasons for start, words in _ADVICE if reason.startswith(start))
    return list(dict.fromkeys(found))


def _describe(layers: Mapping[str, Found]) -> str:
    counts = Counter(str(found.left) for found in layers.values())
    return f"{len(layers)} attention layers, none of which can be sparse: " + ", ".join(
        f"{count} x {reason}" for reason, count in counts.items()
    )


def _describe_others(model: nn.Module) -> str:
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            return "no attention layer but torch.nn.MultiheadAttention, whose kernel is its own"
        if (name := code.other_attention(module)) is not None:
            return f"no attention layer but {original_class(module).__name__}, which calls {name}"
    return "no attention layer (a model without attention has nothing to make sparse)"
