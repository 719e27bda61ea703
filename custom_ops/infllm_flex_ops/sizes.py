"""Arithmetic of sizes, written so that it also serves symbolic ones."""


def ceil_div(size: int, part: int) -> int:
    """Count the parts of ``part`` that cover ``size``, the last one perhaps in part."""
    return (size + part - 1) // part


def group_size(num_heads: int, num_kv_heads: int) -> int:
    """Query heads per key/value head, ``G``."""
    return num_heads // num_kv_heads
