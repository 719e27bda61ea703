"""Arithmetic of sizes, written so that it also serves symbolic ones."""


def ceil_div(size: int, part: int) -> int:
    """Count the parts of ``part`` that cover ``size``, the last one perhaps in part."""
    return (size + part - 1) // part


def next_power_of_2(size: int) -> int:
    """Return the least power of two that is not less than ``size``.

    Triton's own functions of this kind take microseconds on the host, as kernels may call them.
    """
    return 1 << max(size - 1, 0).bit_length()


def group_size(num_heads: int, num_kv_heads: int) -> int:
    """Query heads per key/value head, ``G``."""
    return num_heads // num_kv_heads
