"""The head dims that a rotary embedding turns slowest, where dim ``i`` turns with ``i + D / 2``.

The frequency falls with ``i``, so these are the last dims of each half of a head.
"""

import torch
from torch import Tensor


def slowest_parts(x: Tensor, num_dims: int) -> list[Tensor]:
    """Return views of the ``num_dims`` slowest dims of ``x [..., D]``: one of each half of a head.

    Args:
        x: Queries or keys.
        num_dims: How many, an even number of at most D; D itself is one view, ``x``.
    """
    half = x.shape[-1] // 2
    if num_dims == x.shape[-1]:
        return [x]
    first = half - num_dims // 2
    return [x[..., first:half], x[..., half + first :]]


def slowest_dims(x: Tensor, num_dims: int) -> Tensor:
    """Copy the ``num_dims`` slowest dims of ``x [..., D]``; ``x`` itself where these are all."""
    parts = slowest_parts(x, num_dims)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
