"""The dtype in which attention takes its inputs, inside ``torch.autocast`` and outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Read once at import: Dynamo of PyTorch 2.11 cannot trace `is_autocast_available`.
_DEVICES = tuple(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu")
    if torch.amp.is_autocast_available(device)
)


def is_autocast_on(device: torch.device) -> bool:
    """Whether an autocast region of this device is open here."""
    return device.type in _DEVICES and torch.is_autocast_enabled(device.type)


def attention_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which SDPA would take ``x``: the autocast region's, else its own.

    Rotary embeddings leave queries and keys in float32 beside values in bfloat16.
    """
    if not is_autocast_on(x.device) or not x.is_floating_point() or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def as_autocast(x: Tensor) -> Tensor:
    """Cast ``x`` as SDPA casts its inputs."""
    return x.to(attention_dtype(x))


def attend_outside_autocast(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any
) -> Tensor:
    """Call ``attend`` on inputs cast as SDPA casts them, with autocast off inside.

    Nothing further is cast, so that scores stay float32.

    Args:
        attend: A function of query, key, value and ``args``.
        query: ``[B, Hq, Sq, D]``, often in the dtype of the weights, as rotary embeddings leave it.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, D]``.
        args: Further arguments, passed on.
    """
    if not is_autocast_on(query.device):
        return attend(query, key, value, *args)
    query, key, value = as_autocast(query), as_autocast(key), as_autocast(value)
    with torch.autocast(query.device.type, enabled=False):
        return attend(query, key, value, *args)
