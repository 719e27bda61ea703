"""Replace the class of one module by a subclass that overrides where attention happens.

Only the class of the module changes, so undoing is to give the old one back. A closure or an
instance attribute would not work: a deep copy would still call the first module's weights, and
``torch.save`` could not pickle it.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

# From the class of a module to the members that its subclass overrides.
Overrides = Callable[[Any], dict[str, Any]]

_OWN = "_infllm_own_"


def swap_class(module: nn.Module, adapter: str, overrides: Overrides) -> None:
    """Replace the module's class by a subclass with overrides, unless that is done already.

    Args:
        module: The module.
        adapter: Name of the adapter that overrides.
        overrides: Makes the overriding members.

    Raises:
        TypeError: Python cannot give this module another class (a ``ScriptModule``).
    """
    if swapped_adapter(module) == adapter:
        return
    restore_class(module)
    cls: Any = type(module)
    swapped = _subclass(cls, adapter, overrides)
    for name, member in vars(swapped).items():
        if isinstance(member, property) and name in vars(module):
            vars(module)[_OWN + name] = vars(module)[name]
    _set_class(module, swapped)


def restore_class(module: nn.Module) -> bool:
    """Give the module its own class back.

    Returns:
        Whether it had another.

    Raises:
        ValueError: The class was replaced once more since.
    """
    if swapped_adapter(module) is None:
        return False
    if "_infllm_adapter" not in vars(type(module)):
        raise ValueError(
            f"the class of a patched layer was replaced since: {type(module).__name__} "
            "(by fully_shard?); unpatch before sharding, or attend densely inside "
            "infllm_flex.dense(model)"
        )
    for name in [name for name in vars(module) if name.startswith(_OWN)]:
        del vars(module)[name]
    _set_class(module, original_class(module))
    return True


def own_attribute(module: nn.Module, name: str) -> Any:
    """The attribute of the instance that a property of the swapped class hides.

    It has a second name. Dynamo of PyTorch 2.11 reads the property, without end, where the property
    itself looks into the instance's ``__dict__``.
    """
    return getattr(module, _OWN + name)


def swapped_adapter(module: nn.Module) -> str | None:
    """The adapter for which the module's class was swapped; None where it has its own class."""
    return getattr(type(module), "_infllm_adapter", None)


def original_class(module: nn.Module) -> type:
    """The class of the module before it was swapped."""
    return getattr(type(module), "_infllm_original", type(module))


def runs_own_forward(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class.

    accelerate's hooks set a forward on the instance that calls the class's, which they store beside
    it. When they are removed, the class's forward stays on the instance.
    """
    return "forward" not in vars(module) or bool(_bound_forwards(module))


def _bound_forwards(module: nn.Module) -> list[str]:
    """Attributes of the instance that hold the forward of its class."""
    own = MethodType(type(module).forward, module)
    return [name for name in ("forward", "_old_forward") if vars(module).get(name) == own]


def _set_class(module: nn.Module, cls: Any) -> None:
    names = _bound_forwards(module)
    module.__class__ = cls
    for name in names:
        vars(module)[name] = MethodType(cls.forward, module)


@functools.cache
def _subclass(original: Any, adapter: str, overrides: Overrides) -> type:
    """One subclass per class and adapter, so that equal layers compile to one graph."""

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # The subclass has no importable name, so a pickle holds the original and how to swap it.
        function, arguments, *rest = original.__reduce_ex__(self, protocol)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            return _new, (original, adapter, overrides), *rest
        return function, arguments, *rest

    body = {
        **overrides(original),
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_infllm_original": original,
        "_infllm_adapter": adapter,
    }
    # The same name, because sharding rules and printed models use it.
    return type(original)(original.__name__, (original,), body)


def _new(original: Any, adapter: str, overrides: Overrides) -> nn.Module:
    """An empty module of the swapped class, for ``pickle`` and ``copy``."""
    cls: Any = _subclass(original, adapter, overrides)
    return cls.__new__(cls)
