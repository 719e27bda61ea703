"""Compile kernels for GPUs that are not here, and read the registers and memory they take."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# Shared memory a program may use, in bytes, by compute capability.
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}

_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


def _members(value: Any) -> dict[str, Any]:
    """The members of a NamedTuple by name, and theirs."""
    members = value._asdict() if isinstance(value, tuple) else {}  # type: ignore[attr-defined]
    return members | {k: v for member in members.values() for k, v in _members(member).items()}


class Launch(NamedTuple):
    """One recorded launch: the kernel, its arguments by name, and its compile options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def sizes(self) -> dict[str, Any]:
        """The arguments by name; grouped compile-time constants by their own names."""
        sizes = dict(self.arguments)
        for parameter in self.kernel.params:
            if parameter.is_constexpr:
                sizes |= _members(self.arguments[parameter.name])
        return sizes

    def __str__(self) -> str:
        names = ("N", "TAKEN", "SEGMENT", "BLOCK_N", "ROWS", "TOKENS", "HEADS", "D", "TILE_TOKENS")
        sizes = self.sizes
        shape = " ".join(f"{name}={sizes[name]}" for name in names if name in sizes)
        return f"{self.kernel.__name__} {shape} {self.options}"


class Resources(NamedTuple):
    """Registers per thread, bytes of stack (spills) and of shared memory of a compiled kernel."""

    registers: int
    stack: int
    shared: int


def record_launches(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any], capability: int
) -> list[Launch]:
    """Run a launcher on meta tensors and record its launches, without repeats.

    No kernel runs. The launcher sees a device of the given compute capability.
    """
    import triton

    from infllm_flex_ops import device
    from infllm_flex_ops.block_attention.kernels.attend_blocks import plan as forward
    from infllm_flex_ops.block_attention.kernels.attend_blocks_backward import plan as backward
    from infllm_flex_ops.triton_common import descriptors

    launches: dict[str, Launch] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        launch = Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options)
        assert set(launch.arguments) == set(self.arg_names)
        launches.setdefault(str(launch), launch)

    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.JITFunction, "run", run)
        for module in (device, forward, backward, descriptors):
            patch.setattr(module, "compute_capability", lambda _: capability)
        call()
    return list(launches.values())


class _Driver(NamedTuple):
    """The questions that Triton asks of a GPU driver before it compiles a kernel."""

    capability: int

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def compile_kernel(launch: Launch, capability: int) -> Any:
    """Compile what the launch would run, by Triton's own path from arguments to a kernel."""
    import triton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", _Driver(capability))
        return launch.kernel.warmup(grid=None, **launch.arguments, **launch.options)


def compile_for(launch: Launch, capability: int) -> Resources:
    """Compile what the launch would run, and read what it takes."""
    compiled = compile_kernel(launch, capability)
    usage = resource_usage(compiled.asm["cubin"])
    return Resources(usage["REG"], usage["STACK"], compiled.metadata.shared)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and so on of a compiled kernel, by the names that cuobjdump prints."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}
