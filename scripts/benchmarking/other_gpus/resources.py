"""Resources of each kernel by GPU: registers, spills, shared memory, instructions per step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from benchmarking.ahead_of_time import SHARED_LIMIT, Launch, compile_kernel, record_launches
from benchmarking.ahead_of_time import resource_usage as usage_of
from benchmarking.other_gpus import launches
from benchmarking.sass import disassemble, inner_loop

CAPABILITIES = tuple(SHARED_LIMIT)
# Launchers of the kernels of each stage. Those for nonfinite inputs are left out.
STAGES: dict[str, Callable[[int], None]] = {
    "selection": launches.select,
    "attention": launches.attend,
    "decode": launches.decode,
}
_LEFT_OUT = ("find_nonfinite_kernel", "attend_exact_reads_kernel")
_SPECIALIZED_ROWS = 64  # of a warp group, which is what its inner loop works on


class KernelUse(NamedTuple):
    """A kernel compiled for a GPU.

    Attributes:
        stage: A key of ``STAGES``.
        kernel: Its name.
        group: Query heads per key/value head.
        capability: Compute capability, such as 90.
        rows: Rows of queries in one step of the inner loop; 0: it has no tile.
        keys: Keys in one step; 0: it has no tile.
        warps: Warps that share a step.
        registers: Registers of a thread.
        spilled: Bytes of stack, which holds what registers could not.
        shared: Bytes of shared memory of a program.
        instructions: Instructions of a warp in one step; 0: it has no loop.
        products: How many of them are matrix products.
    """

    stage: str
    kernel: str
    group: int
    capability: int
    rows: int
    keys: int
    warps: int
    registers: int
    spilled: int
    shared: int
    instructions: int
    products: int


def measure(stage: str, G: int, capability: int) -> Iterator[KernelUse]:
    """Compile the kernels of a stage, one by one."""
    call = functools.partial(STAGES[stage], G)
    recorded = record_launches(pytest.MonkeyPatch(), call, capability)
    # Launches repeat for rows of other lengths; the last is for the longest.
    by_name = {launch.kernel.__name__: launch for launch in recorded}
    for name, launch in by_name.items():
        if name not in _LEFT_OUT:
            yield _use(stage, G, launch, capability)


def _use(stage: str, G: int, launch: Launch, capability: int) -> KernelUse:
    compiled = compile_kernel(launch, capability)
    cubin = compiled.asm["cubin"]
    usage, loop = usage_of(cubin), inner_loop(disassemble(cubin))
    sizes, name = launch.sizes, launch.kernel.__name__
    rows = sizes.get("ROWS") or sizes.get("TOKENS", 0) * sizes.get("HEADS", 0)
    keys = sizes.get("BLOCK_N", 0)
    if "specialized" in name:
        rows, keys = _SPECIALIZED_ROWS, sizes["BLOCK_SIZE"]
    return KernelUse(
        stage=stage,
        kernel=name.lstrip("_"),
        group=G,
        capability=capability,
        rows=rows if keys else 0,
        keys=keys if rows else 0,
        warps=launch.options.get("num_warps", 4),
        registers=usage["REG"],
        spilled=usage["STACK"],
        shared=compiled.metadata.shared,
        instructions=loop.instructions if loop else 0,
        products=loop.products if loop else 0,
    )
