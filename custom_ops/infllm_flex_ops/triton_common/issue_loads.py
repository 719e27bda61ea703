"""Loads that are all under way before a kernel waits for the first one."""

import triton
import triton.language as tl


@triton.jit
def issue_loads(x, y):
    """Return ``x`` and ``y``, just loaded; every load before this is issued before either is used.

    To save registers ptxas otherwise waits for some of the loads, stores them in shared memory, and
    issues the others then: several latencies of memory, one after the other. No store moves up
    across the barrier, and Triton does not see through the instruction after it. The registers do
    not suffice before Hopper, where wide heads spill, and the interpreter knows no instruction.
    """
    tl.debug_barrier()
    return _move(x), _move(y)


@triton.jit
def _move(x):
    PER_REGISTER: tl.constexpr = 32 // x.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PER_REGISTER
    )
