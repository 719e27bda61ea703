"""Private APIs behind operators and their transforms."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def are_transforms_active() -> bool:
    """Whether a transform of ``torch.func`` is running, so that an operator must be dispatched.

    API: ``torch._C._are_functorch_transforms_active``, seen in 2.11 to 2.14.
    If it goes: AttributeError at every decode step on the CPU.
    Instead: nothing public.
    """
    return torch._C._are_functorch_transforms_active()


def below_autograd() -> AbstractContextManager[None]:
    """Call an operator without the kernel that gives it gradients, from inside that kernel.

    API: ``torch._C._AutoDispatchBelowAutograd``, seen in 2.11 to 2.14.
    If it goes: AttributeError at every call of an operator with gradients.
    Instead: nothing public; ``register_autograd`` uses it, too.
    """
    return torch._C._AutoDispatchBelowAutograd()


def forward_mode_enabled() -> AbstractContextManager[None]:
    """Leave forward-mode AD on where an autograd function would switch it off.

    API: ``torch.autograd.forward_ad._set_fwd_grad_enabled``, seen in 2.11 to 2.14.
    If it goes: ImportError at every gradient of an operator.
    Instead: nothing public.
    """
    from torch.autograd.forward_ad import _set_fwd_grad_enabled

    return _set_fwd_grad_enabled(True)


def single_level_function() -> type[Any]:
    """Return the base of autograd functions that serve one level of ``torch.func`` at a time.

    API: ``torch.autograd.function._SingleLevelFunction``, seen in 2.11 to 2.14.
    If it goes: AttributeError at import.
    Instead: ``register_autograd``, when it serves ``torch.func``.
    """
    return torch.autograd.function._SingleLevelFunction


def single_level_functions_allowed() -> AbstractContextManager[None]:
    """Allow a function of `single_level_function` inside a transform of ``torch.func``.

    API: ``torch._functorch.utils.enable_single_level_autograd_function``, seen in 2.11 to 2.14.
    If it goes: ImportError at gradients inside ``torch.func``.
    Instead: ``register_autograd``, when it serves ``torch.func``.
    """
    from torch._functorch.utils import enable_single_level_autograd_function

    return enable_single_level_autograd_function()


def assert_async(condition: Tensor, message: str) -> None:
    """Raise on the device, without waiting for it, unless the condition holds.

    API: ``torch._assert_async``, seen in 2.11 to 2.14.
    If it goes: AttributeError in every compiled call with padding or packing.
    Instead: ``torch._check_tensor_all`` is private, too; a public assertion would wait.
    """
    torch._assert_async(condition, message)
