"""What PyTorch's transforms (``backward``, ``torch.func``, forward-mode AD) do to an operator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction
from torch.library import Library

# More specific than the key "Autograd", which `CustomOpDef` takes and whose kernel refuses
# torch.func and drops tangents. Other devices keep that one.
_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradMeta")
_below_autograd = torch._C._AutoDispatchBelowAutograd
_LIBRARY = Library("infllm_flex", "FRAGMENT")


def register_gradients(
    op: CustomOpDef,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> None:
    """Give an operator gradients in reverse mode, also to ``torch.func``; refuse forward mode.

    Args:
        op: All its arguments are positional.
        setup_context: Called with the context, the arguments and the output. Arguments that equal
            their default may be missing.
        backward: Called with the context and the gradients of the outputs; returns a gradient or
            None for each argument that ``setup_context`` was given.
    """

    class Gradients(_SingleLevelFunction):
        apply: Any

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            # A Function's forward switches both modes off, but the transforms further out, which
            # the operator is on its way to, have not had their turn yet.
            with torch.enable_grad(), _set_fwd_grad_enabled(True), _below_autograd():
                output = op(*args)
            setup_context(ctx, args, output)
            return output

    Gradients.backward = staticmethod(backward)  # type: ignore[method-assign]
    Gradients.__name__ = f"GradientsOf_{op._name}"

    def call(*args: Any) -> Any:
        refuse_forward_mode(op._name, *args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            with _below_autograd():
                return op(*args)
        if not torch._C._are_functorch_transforms_active():
            return Gradients.apply(*args)
        with enable_single_level_autograd_function():  # the dispatcher calls once for each level
            return Gradients.apply(*args)

    for key in _KEYS:
        _LIBRARY.impl(op._name, call, key)


def refuse_forward_mode(name: str, *args: Any) -> None:
    """Raise a NotImplementedError if an argument carries a tangent, which would be lost."""
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, dual tensors): use "
            "reverse mode (backward, torch.func.grad, vjp, jacrev)"
        )


def refuse_gradients(op: CustomOpDef, reason: str) -> None:
    """Refuse gradients of an operator in either mode, in words a user understands.

    Args:
        op: All its arguments are positional.
        reason: What there is no derivative of, and what to do.
    """

    def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        return None

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(reason)

    register_gradients(op, save_nothing, refuse)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether ``torch.func`` or forward-mode AD is at work, which compiled code would not see."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def register_vmap(op: CustomOpDef) -> None:
    """Serve ``torch.func.vmap`` by the batch dimension, the first of every tensor of ``op``."""

    def call(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def fold(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            rows = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return rows.flatten(0, 1)

        output = op(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
        if isinstance(output, Tensor):
            return output.unflatten(0, (info.batch_size, -1)), 0
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in output), (0,) * len(output)

    op.register_vmap(call)
