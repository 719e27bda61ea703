"""Find the last of some programs to finish, which then merges the results of all of them.

Which program that is varies from run to run. It merges in a fixed order, so that the bits of the
result do not. Counters begin at zero in every launch: an earlier kernel of the same step clears
them, so that nothing is left by a launch that failed or that runs on another stream.
"""

import triton
import triton.language as tl

COUNTERS = 8  # of one row's KV head; the first counts programs that score, the others that attend
NUM_COUNTERS = tl.constexpr(COUNTERS)


@triton.jit
def clear_counters(counters_ptr, head, clears):
    """Clear the counters of a KV head, for the kernels after this one, where ``clears`` is true."""
    counter = tl.arange(0, NUM_COUNTERS)
    tl.store(counters_ptr + head * NUM_COUNTERS + counter, 0, mask=(counter >= 0) & clears)


@triton.jit
def is_last_program(counters_ptr, head, counter, count):
    """Whether the other programs of ``count`` have stored their results.

    The last program reads these with the cache modifier ``.cg``: its first-level cache may hold
    older values.

    Args:
        counters_ptr: int32 ``[heads, NUM_COUNTERS]``.
        head: The row's KV head.
        counter: Which of its counters.
        count: Programs that call this, each once.
    """
    tl.debug_barrier()  # every warp has stored its results before one thread counts the program
    counter_ptr = counters_ptr + head * NUM_COUNTERS + counter
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    return arrived == count - 1
