"""Which head dim a kernel reads where only the slowest rotary dims are scored."""

import triton
import triton.language as tl


@triton.jit
def slowest_dim(i, NUM: tl.constexpr, D: tl.constexpr):
    """Return the head dim of number ``i`` among the ``NUM`` of ``D`` that turn slowest.

    Divisions by constants, and no selection, let the compiler see that dims lie side by side: loads
    stay vectorised.
    """
    if NUM == D:
        return i
    HALF: tl.constexpr = NUM // 2
    return i // HALF * (D // 2) + (D // 2 - HALF) + i % HALF
