"""Keep autocast out of the operators: their own precision is part of what they mean."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_autocast(function: _Function) -> _Function:
    """Run an operator's body as written, on inputs as they came, inside an autocast region too.

    Args:
        function: The body; its first argument is a tensor.
    """

    @functools.wraps(function)
    def run(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return function(first, *args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return run  # type: ignore[return-value]
