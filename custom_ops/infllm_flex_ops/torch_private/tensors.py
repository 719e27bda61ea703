"""Private APIs of tensors and of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_fake(x: Tensor) -> bool:
    """Whether a tensor has no values because a compiler or an exporter made it.

    API: ``torch._subclasses.fake_tensor.FakeTensor``, seen in 2.11 to 2.14.
    If it goes: AttributeError at every call with a mask.
    Instead: nothing public.
    """
    return isinstance(x, torch._subclasses.fake_tensor.FakeTensor)


def write_count(x: Tensor) -> int:
    """Count the writes to a tensor and its views that autograd knows of.

    API: ``Tensor._version``, seen in 2.11 to 2.14.
    If it goes: AttributeError at every decode step.
    Instead: nothing public.
    """
    return x._version


def memory_users(x: Tensor) -> int | None:
    """Count the tensors and storages that use the memory of a tensor; None if unknown.

    API: ``torch._C._storage_Use_Count`` and ``UntypedStorage._cdata``, seen in 2.11 to 2.14.
    If it goes: None, and a cropped cache is copied before it grows again.
    Instead: nothing public.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = x.untyped_storage()  # counts itself
    return None if count is None else count(storage._cdata) - 1


def parse_to(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """Read device and dtype from the arguments of ``Tensor.to``.

    API: ``torch._C._nn._parse_to``, seen in 2.11 to 2.14.
    If it goes: AttributeError in models that are spread over devices.
    Instead: nothing public; four forms of arguments would have to be read by hand.
    """
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to the leaves of nested containers.

    API: ``torch.utils._pytree.tree_map``, seen in 2.11 to 2.14.
    If it goes: AttributeError when a stand-in for a mask is used as a tensor.
    Instead: a loop over lists, tuples and dicts.
    """
    return torch.utils._pytree.tree_map(function, tree)
