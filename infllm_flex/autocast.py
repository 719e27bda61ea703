"""The dtype in which attention takes its inputs, inside ``torch.autocast`` and outside."""

from __future__ import annotations

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
