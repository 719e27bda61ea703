"""Private APIs of Dynamo and of the tracers before it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Result = TypeVar("_Result")


def constant_to_graphs(function: _Function) -> _Function:
    """Have compilers call a function while they trace, and keep its result as a constant.

    API: the attribute ``_dynamo_marked_constant``, seen in 2.11 to 2.14.
    If it goes: graph breaks, an error with ``fullgraph=True``.
    Instead: ``torch.compiler.assume_constant_result``, which imports Dynamo for seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_compiled(function: Any) -> bool:
    """Whether a function came out of ``torch.compile``.

    API: the attribute ``_torchdynamo_orig_callable``, seen in 2.11 to 2.14.
    If it goes: an error for a compiled forward that was set on an instance, at its first call.
    Instead: nothing public.
    """
    return hasattr(function, "_torchdynamo_orig_callable")


def is_traced_otherwise() -> bool:
    """Whether ``torch.fx.symbolic_trace`` is running.

    API: ``torch.fx._symbolic_trace.is_fx_symbolic_tracing``, seen in 2.11 to 2.14.
    If it goes: AttributeError in every ``patch_model``.
    Instead: nothing public; ``torch.jit.is_tracing`` is the public question for the other tracer.
    """
    return torch.fx._symbolic_trace.is_fx_symbolic_tracing()


def mark_static_address(x: Tensor) -> None:
    """Promise compilers that a tensor keeps its memory, so that CUDA graphs need no copy of it.

    API: ``torch._dynamo.mark_static_address``, seen in 2.11 to 2.14.
    If it goes: AttributeError when a static cache is made.
    Instead: nothing public.
    """
    torch._dynamo.mark_static_address(x)


def recompile_limit(count: int, strict: bool = False) -> AbstractContextManager[Any]:
    """Allow ``count`` graphs per function; if ``strict``, raise instead of running uncompiled.

    API: ``torch._dynamo.config.patch``, ``recompile_limit``, seen in 2.11 to 2.14.
    If it goes: AttributeError at the first call of the Flex engine.
    Instead: ``torch.compile(recompile_limit=...)`` of 2.13, when no older one is served.
    """
    limits = {"recompile_limit": count, **({"fail_on_recompile_limit_hit": True} if strict else {})}
    return torch._dynamo.config.patch(limits)


def without_side_effect_check(function: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function whose side effect Dynamo would refuse inside a checkpointed region.

    API: ``torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer``, seen in
    2.11 to 2.14.
    If it goes: an error when a patched model of no known library is compiled.
    Instead: nothing public.
    """
    call = torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer
    return call(function, *args)
