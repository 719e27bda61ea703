"""An object that stands for a tensor, which is made when code first uses it as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from infllm_flex_ops.torch_private import tree_map


class TensorProxy:
    """Becomes its tensor in any attribute, operator or torch function that it does not define."""

    def to_tensor(self) -> Tensor:
        """The tensor, for code that is not ours and may change it."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.to_tensor(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a torch function with tensors in place of proxies."""
        args, kwargs = tree_map(_as_tensor, (args, kwargs or {}))
        return func(*args, **kwargs)


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: TensorProxy, *args: Any) -> Any:
        return getattr(self.to_tensor(), name)(*map(_as_tensor, args))

    return apply


def _as_tensor(x: Any) -> Any:
    return x.to_tensor() if isinstance(x, TensorProxy) else x


# Python looks operators up on the class, not on the instance.
_BINARY = ("add", "sub", "mul", "truediv", "and", "or", "xor")
_OPERATORS = ("getitem", "setitem", "len", "iter", "bool", "invert", "neg", "abs", "matmul")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OPERATORS, *_COMPARISONS):
    setattr(TensorProxy, f"__{_name}__", _operator(f"__{_name}__"))
TensorProxy.__hash__ = object.__hash__  # type: ignore[method-assign]
