"""The head dims that a rotary embedding turns slowest, where dim ``i`` turns with ``i + D / 2``."""

import torch
from torch import Tensor


def slowest_dims(x: Tensor, num_dims: int) -> Tensor:
    """Copy the dims of the lowest frequencies: the last ones of each half of a head.

    Args:
        x: Queries or keys ``[..., D]``.
        num_dims: How many, an even number of at most D.

    Returns:
        ``[..., num_dims]``; ``x`` itself where these are all.
    """
    half = x.shape[-1] // 2
    if num_dims == x.shape[-1]:
        return x
    first = half - num_dims // 2
    return torch.cat([x[..., first:half], x[..., half + first :]], -1)


def scores_cache(q: Tensor, compressed: Tensor, window: int) -> bool:
    """Whether the keys that are scored are the cache itself, not a copy of a part of their dims."""
    return window == 1 and compressed.shape[3] == q.shape[3]
