"""Register the operators ``infllm_flex::*``, and call them.

An operator is registered in these steps, in the file of its name:

1. `define_operator` on a function of plain tensor operations. The function is the definition: it
   runs on the CPU, and the kernels are judged against it.
2. ``register_fake`` on a function that makes empty outputs, for compilers.
3. `cuda_launcher`, which names the module of the Triton kernels.
4. Its place in transforms, from `infllm_flex_ops.transforms`: ``register_gradients`` or
   ``refuse_gradients``, and ``register_vmap`` if every tensor has a batch dimension.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from infllm_flex_ops import torch_private

if TYPE_CHECKING:
    from torch.library import CustomOpDef  # type: ignore[attr-defined]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def define_operator(
    *, mutates_args: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function the definition of the operator ``infllm_flex::<its name>``.

    Autocast is off inside the function. The operator keeps the function in its attribute
    ``plain``, for `skip_dispatcher`.

    Args:
        mutates_args: Names of the arguments that the function writes to.

    Returns:
        A decorator for a function whose first argument is a tensor.
    """

    def define(function: Callable[..., Any]) -> CustomOpDef:
        body = without_autocast(function)
        name = f"infllm_flex::{function.__name__}"
        op = torch.library.custom_op(name, body, mutates_args=mutates_args)
        op.plain = body  # type: ignore[attr-defined]
        return op

    return define


def cuda_launcher(
    op: CustomOpDef,
    module: str,
    function: str = "launch",
    pack: Callable[..., tuple[Any, ...]] | None = None,
) -> None:
    """Run an operator on CUDA by a function that is imported at its first call.

    Triton is thereby imported only where there is a GPU to launch on. The operator keeps what
    imports the function in its attribute ``launcher``, and ``pack``. Its attribute ``on_cuda`` is
    what it runs, for `skip_dispatcher`.

    Args:
        op: The operator.
        module: The module of its kernels, below ``infllm_flex_ops``.
        function: Name of a function there, which takes the operator's arguments.
        pack: Groups the operator's arguments for that function, for example into a NamedTuple.
    """

    @functools.cache
    def find() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"infllm_flex_ops.{module}"), function)

    @op.register_kernel("cuda")
    def launch(*args: Any) -> Any:
        if args[0].dtype is torch.float64:
            raise NotImplementedError(
                "block selection and sparse attention have no float64 on a GPU: cast to float32, "
                "bfloat16 or float16, or run on the CPU"
            )
        return find()(*args) if pack is None else find()(*pack(*args))

    op.launcher, op.pack, op.on_cuda = find, pack, launch  # type: ignore[attr-defined]


def without_autocast(function: _Function) -> _Function:
    """Switch autocast off inside a function: its precision is part of its definition.

    Args:
        function: Its first argument is a tensor.
    """

    @functools.wraps(function)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return function(first, *args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return run  # type: ignore[return-value]


def without_grad(function: _Function) -> _Function:
    """Switch gradients off inside a function.

    Unlike ``torch.no_grad``, it takes no time where they are off already, as in generation.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def is_plain(x: Tensor) -> bool:
    """Whether the dispatcher would only take time: no graph, gradients, transform or subclass.

    Its time counts in a decode step, whose operators take microseconds themselves.
    """
    if type(x) is not Tensor or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not torch_private.are_transforms_active()


def is_plain_on_cpu(x: Tensor) -> bool:
    """Whether `is_plain`, on the CPU."""
    return x.is_cpu and is_plain(x)


def skip_dispatcher(op: CustomOpDef, x: Tensor) -> Callable[..., Any]:
    """Return what an operator runs on the device of ``x`` if ``x`` is plain, else the operator."""
    return direct_kernel(op, x.device) if is_plain(x) else op


def direct_kernel(op: CustomOpDef, device: torch.device) -> Callable[..., Any]:
    """Return what an operator runs on a device; the operator for a GPU that is not the current."""
    if device.type == "cpu":
        return op.plain  # type: ignore[attr-defined]
    if device.type == "cuda" and device.index == torch.cuda.current_device():
        return getattr(op, "on_cuda", op)
    return op
