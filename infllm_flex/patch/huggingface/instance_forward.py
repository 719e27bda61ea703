"""A forward set on an attention layer itself, which goes before that of its class.

accelerate and others set one that ends in the class's. One that attends by itself never reaches our
attention function, whatever the class's code says.
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
from infllm_flex.patch.layer_state import get_layer

_REASON = "a forward set on the instance, which calls neither that of its class nor the registry"
_REACH = 100  # callables within callables that are looked at
_running = threading.local()
# The forward of a module that was found to be able to reach our function, and whether to watch it.
_judged: weakref.WeakKeyDictionary[nn.Module, tuple[Any, bool]] = weakref.WeakKeyDictionary()


def unreached_reason(module: nn.Module) -> str | None:
    """Why our attention function cannot be reached, in a few words; None where it may be."""
    own = vars(module).get("forward")
    if own is None:
        return None
    targets = {
        id(f) for base in type(module).__mro__ for f in _unwrapped(vars(base).get("forward"))
    }
    reached = _reach(own)
    leads = (id(f) in targets or (isinstance(f, FunctionType) and _names_a_way(f)) for f in reached)
    return None if any(leads) or len(reached) == _REACH else _REASON


def _reach(forward: Any) -> list[Any]:
    """A callable and what it may call, as far as it holds that."""
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


def _names_a_way(function: FunctionType) -> bool:
    """Whether code looks up attention functions, or calls some forward: which, running it tells."""
    return not {"ALL_ATTENTION_FUNCTIONS", "forward", "_old_forward"}.isdisjoint(
        names(function.__code__)
    )


def _callables_in(found: Any) -> list[Any]:
    """What a callable may call: wrapped, bound, in its closure, or an attribute of an object."""
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
    """Before a forward of a sparse layer with a forward of its own: have it watched.

    Raises:
        UnsupportedModelError: It was set since patching, and cannot reach our function.
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
        # In a graph of its own, what runs is no Python that could be watched.
        compiled = any(hasattr(f, "_torchdynamo_orig_callable") for f in _reach(own))
        known = _judged[module] = (weakref.ref(own), not compiled)  # it may hold the module
    if not known[1]:
        return
    if _require_call not in module._forward_hooks.values():
        module.register_forward_hook(_require_call, with_kwargs=True)
    _running.unreached = module


def record_call(module: nn.Module) -> None:
    """Our attention function was called for a layer."""
    if getattr(_running, "unreached", None) is module:
        _running.unreached = None


def remove_call_hook(module: nn.Module) -> None:
    """Undo what `watch_call` did."""
    for key, hook in list(module._forward_hooks.items()):
        if hook is _require_call:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)


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
        "function: a forward set on the instance went before that of its class; remove it, or call "
        "infllm_flex.infllm_attention there"
    )
