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


def attention_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which SDPA would take ``x``: the autocast region's, else its own.

    Rotary embeddings leave queries and keys in float32 beside values in bfloat16.
    """
    device = x.device.type
    if device not in _DEVICES or not torch.is_autocast_enabled(device):
        return x.dtype
    if not x.is_floating_point() or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(device)


def as_autocast(x: Tensor) -> Tensor:
    """Cast ``x`` as SDPA casts its inputs."""
    return x.to(attention_dtype(x))
