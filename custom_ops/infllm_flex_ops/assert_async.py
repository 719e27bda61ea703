"""Assert on the device, without waiting for it, from inside any graph."""

import torch
from torch import Tensor

from infllm_flex_ops import torch_private
from infllm_flex_ops.dispatch import define_operator


@define_operator()
def assert_async(condition: Tensor, message: str) -> Tensor:
    """Raise on the device, without waiting for it, unless the condition holds.

    An operator of its own, because Inductor's own assertion ends the process on the CPU.

    Args:
        condition: bool, one element.
        message: The expectation, and the remedy.

    Returns:
        Zero, float32 ``[]``. Add it to what depends on the condition, so that no compiler pass
        removes the check.
    """
    torch_private.assert_async(condition, message)
    return torch.zeros((), device=condition.device)


@assert_async.register_fake
def _(condition: Tensor, message: str) -> Tensor:
    return torch.empty((), device=condition.device)
