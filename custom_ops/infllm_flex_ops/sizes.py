"""Arithmetic of sizes, written so that it also serves symbolic ones."""

from torch import Tensor


def ceil_div(size: int, part: int) -> int:
    """Count the parts of ``part`` that cover ``size``, the last one perhaps in part."""
    return (size + part - 1) // part


def group_size(q: Tensor, k: Tensor) -> int:
    """Query heads per key/value head: ``G`` of ``q [B, Hq, Sq, D]`` and ``k [B, Hkv, Skv, D]``."""
    return q.shape[1] // k.shape[1]
