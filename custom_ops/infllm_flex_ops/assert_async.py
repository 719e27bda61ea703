"""Assert on the device, without waiting for it, from inside any graph."""

import torch
from torch import Tensor

from infllm_flex_ops import torch_private
from infllm_flex_ops.dispatch import define_operator


@define_operator()
def assert_async(condition: Tensor, message: str) -> Tensor:
    """Zero where the condition holds; else an error, on the device without waiting for it.

    Add the zero to what depends on the condition, so that no pass takes the check out of a graph.
    An operator of its own because Inductor's own assertion ends the process on the CPU.

    Args:
        condition: bool, one element.
        message: What was expected and what to do.

    Returns:
        float32 ``[]``.
    """
    torch_private.assert_async(condition, message)
    return torch.zeros((), device=condition.device)


@assert_async.register_fake
def _(condition: Tensor, message: str) -> Tensor:
    return torch.empty((), device=condition.device)
