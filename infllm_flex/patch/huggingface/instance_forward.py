"""A forward that was set on an attention layer's instance, in place of its class's.

The forward that accelerate and others set calls the class's. One that attends by itself never
reaches our attention function, whatever the class's code says.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from infllm_flex.patch.code_inspection import names
from infllm_flex.patch.errors import UnsupportedModelError
from infllm_flex.patch.huggingface.transformers_private import REGISTRY
from infllm_flex.patch.layer_state import get_layer
from infllm_flex_ops import torch_private

_REASON = "a forward set on the instance, which calls neither that of its class nor the registry"
_REACH = 100  # most callables within callables that are examined
_running = threading.local()
# By module: its instance forward, which can reach our function, and whether to watch its calls.
_judged: weakref.WeakKeyDictionary[nn.Module, tuple[Any, bool]] = weakref.WeakKeyDictionary()


def unreached_reason(module: nn.Module) -> str | None:
    """Why our attention function cannot be reached, in a few words; None where it can be."""
    own = vars(module).get("forward")
    if own is None:
        return None
    targets = {
        id(f) for base in type(module).__mro__ for f in _unwrapped(vars(base).get("forward"))
    }
    reached = _reach(own)
    leads = (
        id(f) in targets or (isinstance(f, FunctionType) and _may_reach_registry(f))
        for f in reached
    )
    return None if any(leads) or len(reached) == _REACH else _REASON


def _reach(forward: Any) -> list[Any]:
    """A callable, and all callables that it holds and may call."""
    reached: list[Any] = []
    queue = [forward]
    while queue and len(reached) < _REACH:
        found = queue.pop()
        if not any(found is known for known in reached):
            reached.append(found)
            queue.extend(_callables_in(found))
    return reached


def _unwrapped(forward: Any) -> Iterator[Any]:
    while isinstance(forward, FunctionType) and forward.__module__ != nn.Module.__module__:
        yield forward
        forward = getattr(forward, "__wrapped__", None)


def _may_reach_registry(function: FunctionType) -> bool:
    """Whether code looks up attention functions, or calls some forward."""
    return not {REGISTRY, "forward", "_old_forward"}.isdisjoint(names(function.__code__))


def _callables_in(found: Any) -> list[Any]:
    """The callables that one holds: wrapped, bound, in its closure, or attributes of its object."""
    if isinstance(found, MethodType):
        return [found.__func__]
    held = list(getattr(found, "__dict__", {}).values())
    if isinstance(found, functools.partial):
        held += [found.func, *found.args, *found.keywords.values()]
    elif isinstance(found, FunctionType):
        held += [*(found.__defaults__ or ()), *(found.__kwdefaults__ or {}).values()]
        held += [cell.cell_contents for cell in found.__closure__ or () if _is_filled(cell)]
    elif callable(found):
        held.append(vars(type(found)).get("__call__"))
    return [x for x in held if callable(x) and not isinstance(x, nn.Module | type)]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def watch_call(module: nn.Module) -> None:
    """Watch a sparse layer's call, which runs the forward of its instance.

    Raises:
        UnsupportedModelError: That forward was set since patching, and cannot reach our function.
    """
    layer = get_layer(module)
    if layer is None or layer.skip_reason is not None:
        return
    own = vars(module)["forward"]
    known = _judged.get(module)
    if known is None or known[0]() is not own:
        if unreached_reason(module) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} was patched to be sparse, but has {_REASON}: unpatch the "
                "model before setting it, or call infllm_flex.infllm_attention there"
            )
        # A compiled forward runs no Python that could be watched.
        compiled = any(torch_private.is_compiled(f) for f in _reach(own))
        known = _judged[module] = (weakref.ref(own), not compiled)  # a forward may hold its module
    if not known[1]:
        return
    if _require_call not in torch_private.forward_hooks(module):
        module.register_forward_hook(_require_call, with_kwargs=True)
    _running.unreached = module


def record_call(module: nn.Module) -> None:
    """Note that a layer has called our attention function."""
    if getattr(_running, "unreached", None) is module:
        _running.unreached = None


def remove_call_hook(module: nn.Module) -> None:
    """Undo `watch_call`."""
    torch_private.remove_forward_hooks(module, lambda hook: hook is _require_call)


def _require_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    layer = get_layer(module)
    if torch.compiler.is_compiling() or getattr(_running, "unreached", None) is not module:
        return
    _running.unreached = None
    inputs = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 2)
    hidden = next(inputs, None)  # [B, S, width]
    if layer is None or hidden is None or layer.attends_densely(hidden.shape[1]):
        return
    raise UnsupportedModelError(
        f"{type(module).__name__} attended to {hidden.shape[1]} tokens without its attention "
        "function: a forward set on the instance replaces that of its class; remove it, or call "
        "infllm_flex.infllm_attention there"
    )
