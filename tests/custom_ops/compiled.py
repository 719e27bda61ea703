"""Cases of ahead-of-time compilation, and the resources that a compiled kernel may take."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from benchmarking.ahead_of_time import (
    SHARED_LIMIT,
    Launch,
    Resources,
    compile_for,
    record_launches,
)

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
EIGHT = torch.float8_e4m3fn

# Capabilities that each run compiles a case for; ``--slow`` compiles it for all.
EACH = tuple(SHARED_LIMIT)
HOPPER = (90,)
AMPERE_TOO = (80, 90)
ADA_TOO = (89, 90)  # which has the least shared memory
NONE = ()

# Bytes that a kernel may spill where it was measured to run faster so: a step of 64 rows spills a
# little and still takes less time than two steps of 32.
_MEASURED_SPILLS = {("dkv_kernel", 90): 160}
# Before Hopper, where a group is no power of two, eight output offsets are kept on the stack: they
# are written before the loop over the list and read after it.
_WAITING_SPILLS = 32
_ADA_SPILLS = 16  # of kernels that do not spill on sm_80, with the same instructions


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def case(call: Callable[..., None], *args: Any, on: tuple[int, ...] = HOPPER) -> list[Any]:
    """A call for each GPU: parameters ``call``, ``args``, ``capability``; slow if not of ``on``."""
    names = [call.__name__.strip("_"), *(str(x).removeprefix("torch.") for x in args)]
    return [
        pytest.param(
            call,
            args,
            capability,
            marks=() if capability in on else pytest.mark.slow,
            id="-".join([*names, f"sm_{capability}"]),
        )
        for capability in SHARED_LIMIT
    ]


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile a launch, and print the resources that it takes."""
    used = compile_for(launch, capability)
    sys.stdout.write(f"sm_{capability} {launch}: {used}\n")
    return used


def compile_call(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., None], args: tuple[Any, ...], gpu: int
) -> None:
    """Compile every launch of a call."""
    for launch in record_launches(monkeypatch, lambda: call(*args), gpu):
        compile_launch(launch, gpu)


def assert_no_spills(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., None], args: tuple[Any, ...], gpu: int
) -> None:
    """Compile every launch of a call: none spills, but for named exceptions, and each fits."""
    for launch in record_launches(monkeypatch, lambda: call(*args), gpu):
        used = compile_launch(launch, gpu)
        allowed = _ADA_SPILLS if gpu == 89 else 0
        G = launch.sizes.get("G", 1)
        walks = launch.kernel.__name__ in ("attend_kernel", "dq_kernel")
        if walks and gpu < 90 and G & (G - 1):
            allowed = _WAITING_SPILLS
        allowed = _MEASURED_SPILLS.get((launch.kernel.__name__, gpu), allowed)
        assert used.stack <= allowed, f"{launch} spills"
        assert used.shared <= SHARED_LIMIT[gpu]


def assert_each_run_has_every_kernel(monkeypatch: pytest.MonkeyPatch, cases: list[Any]) -> None:
    """Each run compiles every kernel of the slow cases: for each GPU, for Hopper in each dtype."""
    quick = [x for x in cases if not x.marks]
    missing = _kernels(monkeypatch, cases) - _kernels(monkeypatch, quick)
    assert not missing, f"compiled with --slow alone: {missing}"


def _kernels(monkeypatch: pytest.MonkeyPatch, cases: Iterable[Any]) -> set[tuple[int, str, Any]]:
    kernels = set()
    for parameters in cases:
        call, args, gpu = parameters.values
        dtype = args[0] if gpu == 90 and args and isinstance(args[0], torch.dtype) else None
        launches = record_launches(monkeypatch, lambda call=call, args=args: call(*args), gpu)
        kernels |= {(gpu, launch.kernel.__name__, dtype) for launch in launches}
    return kernels
