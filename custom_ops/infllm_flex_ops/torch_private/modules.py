"""Private APIs of modules: their hooks and children."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from torch import nn


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """List the hooks that run before the forward of a module.

    API: ``Module._forward_pre_hooks``, seen in 2.11 to 2.14.
    If it goes: AttributeError in every ``patch_model`` of a transformers model.
    Instead: nothing public; handles of ``register_forward_pre_hook`` are lost in a copied model.
    """
    return list(module._forward_pre_hooks.values())


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """List the hooks that run after the forward of a module.

    API: ``Module._forward_hooks``, seen in 2.11 to 2.14.
    If it goes: AttributeError at the first call of a forward that was set on an instance.
    Instead: nothing public, as for `forward_pre_hooks`.
    """
    return list(module._forward_hooks.values())


def remove_forward_pre_hooks(module: nn.Module, is_ours: Callable[[Any], bool]) -> None:
    """Remove hooks before the forward, which in a copied model have no handles.

    API: ``Module._forward_pre_hooks`` and ``_forward_pre_hooks_with_kwargs``, seen in 2.11 to 2.14.
    If it goes: AttributeError in every ``unpatch_model``.
    Instead: nothing public.
    """
    for key, hook in list(module._forward_pre_hooks.items()):
        if is_ours(hook):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def remove_forward_hooks(module: nn.Module, is_ours: Callable[[Any], bool]) -> None:
    """Remove hooks after the forward, which in a copied model have no handles.

    API: ``Module._forward_hooks``, ``_forward_hooks_with_kwargs`` and
    ``_forward_hooks_always_called``, seen in 2.11 to 2.14.
    If it goes: AttributeError in every ``unpatch_model``.
    Instead: nothing public.
    """
    for key, hook in list(module._forward_hooks.items()):
        if is_ours(hook):
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


def code_that_calls(module: nn.Module, frame: FrameType) -> CodeType | None:
    """Return the code of the frame that calls a hook of a module, for `is_being_called`.

    API: a frame of ``Module._call_impl`` that lasts as long as the call, and has the module as
    ``self``, seen in 2.11 to 2.14.
    If it goes: None. A forward that was interrupted is then told by its module alone.
    Instead: nothing public; hooks with ``always_call`` are not called after a KeyboardInterrupt.
    """
    return frame.f_code if frame.f_locals.get("self") is module else None


def is_being_called(module: nn.Module, code: CodeType, frame: FrameType | None) -> bool:
    """Whether a call of a module is on a stack.

    API: as for `code_that_calls`, seen in 2.11 to 2.14.
    If it goes: as there.
    Instead: as there.

    Args:
        module: The module.
        code: The result of `code_that_calls`.
        frame: The innermost frame of the stack.
    """
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def replace_child(copied: nn.Module, name: str, child: nn.Module) -> None:
    """Replace a child of a shallow copy of a module, and leave the original its own.

    API: ``Module._modules``, seen in 2.11 to 2.14.
    If it goes: the original loses its child.
    Instead: nothing public; ``setattr`` writes to the dict that both modules hold.
    """
    copied._modules = {**copied._modules, name: child}
