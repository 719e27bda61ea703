"""When to call the plain functions behind the operators, rather than the operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_plain_on_cpu(x: Tensor) -> bool:
    """Whether the dispatcher would add nothing but its own time.

    It has work to do for a graph, gradients, a transform of ``torch.func`` or a GPU.
    A decode step is so short on the CPU that dispatching its operators would take a fifth of it.
    """
    plain = type(x) is Tensor and x.is_cpu and not torch.is_grad_enabled()
    if not plain or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()


def past_dispatcher(op: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """The definition of an operator if ``x``, one of its arguments, is plain; else itself."""
    return getattr(op, "_init_fn", op) if is_plain_on_cpu(x) else op
