"""Registration of operators with PyTorch's transforms: backward, ``torch.func``, forward mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from infllm_flex_ops import torch_private

if TYPE_CHECKING:
    from torch.library import CustomOpDef  # type: ignore[attr-defined]

# More specific than the key "Autograd", which `custom_op` takes and whose kernel refuses
# torch.func and drops tangents. Other devices keep that one.
_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradMeta")
_LIBRARY = Library("infllm_flex", "FRAGMENT")


def register_gradients(
    op: CustomOpDef,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> None:
    """Give an operator gradients in reverse mode, also in ``torch.func``; refuse forward mode.

    Args:
        op: Takes all its arguments by position.
        setup_context: Called with the context, the arguments and the output. Arguments that equal
            their default may be missing.
        backward: Called with the context and the gradients of the outputs; returns a gradient or
            None for each argument that ``setup_context`` was given.
    """
    name = op.plain.__name__  # type: ignore[attr-defined]

    class Gradients(torch_private.single_level_function()):  # type: ignore[misc]
        apply: Any

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            # A Function's forward switches both modes off. The outer transforms, which the
            # operator is dispatched to next, still need them.
            with (
                torch.enable_grad(),
                torch_private.forward_mode_enabled(),
                torch_private.below_autograd(),
            ):
                output = op(*args)
            setup_context(ctx, args, output)
            return output

    Gradients.backward = staticmethod(backward)
    Gradients.__name__ = f"GradientsOf_{name}"

    def call(*args: Any) -> Any:
        refuse_forward_mode(name, *args)
        if not (torch.is_grad_enabled() and _any_requires_grad(args)):
            with torch_private.below_autograd():
                return op(*args)
        if not torch_private.are_transforms_active():
            return Gradients.apply(*args)
        # The dispatcher calls once for each level.
        with torch_private.single_level_functions_allowed():
            return Gradients.apply(*args)

    for key in _KEYS:
        _LIBRARY.impl(name, call, key)


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in args)


def refuse_forward_mode(name: str, *args: Any) -> None:
    """Raise a NotImplementedError if an argument carries a tangent, which would be lost."""
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, dual tensors): use "
            "reverse mode (backward, torch.func.grad, vjp, jacrev)"
        )


def refuse_gradients(op: CustomOpDef, reason: str) -> None:
    """Refuse gradients of an operator in either mode.

    Args:
        op: Takes all its arguments by position.
        reason: The error's text: what has no derivative, and what to do.
    """

    def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        return None

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(reason)

    register_gradients(op, save_nothing, refuse)


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
