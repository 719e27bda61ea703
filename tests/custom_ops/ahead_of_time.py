"""Compile kernels for GPUs that are not here: what a launcher would launch, and what it takes."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

# Shared memory a program may use, in bytes, by compute capability.
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Launch(NamedTuple):
    """One recorded launch: the kernel and its arguments by name, compile options apart."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    def __str__(self) -> str:
        names = ("N", "TAKEN", "SEGMENT", "BLOCK_N", "ROWS", "TOKENS", "HEADS", "D", "TILE_TOKENS")
        shape = " ".join(f"{n}={self.arguments[n]}" for n in names if n in self.arguments)
        return f"{self.kernel.__name__} {shape} {self.options}"


class Resources(NamedTuple):
    """What one compiled kernel takes."""

    registers: int
    stack: int
    shared: int


def record_launches(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any], capability: int
) -> list[Launch]:
    """Run a launcher, on meta tensors, without running its kernels; repeats are left out.

    The launcher believes it is on a device of this compute capability.
    """
    import triton

    from infllm_flex_ops import device
    from infllm_flex_ops.block_attention.kernels import attend_blocks
    from infllm_flex_ops.triton_common import descriptors

    launches: dict[str, Launch] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        launch = Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options)
        assert set(launch.arguments) == set(self.arg_names)
        launches.setdefault(str(launch), launch)

    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.JITFunction, "run", run)
        for module in (device, attend_blocks, descriptors):
            patch.setattr(module, "compute_capability", lambda _: capability)
        call()
    return list(launches.values())


def compile_for(launch: Launch, capability: int) -> Resources:
    """Compile as the launch would be: integers 1 and multiples of 16 are specialised."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
    from triton.tools.tensor_descriptor import TensorDescriptor

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or (specialise and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif value is None:
            signature[name], constants[name] = "constexpr", None
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_POINTERS[value.base.dtype][1:]}{value.block_shape}>"
        elif isinstance(value, GluonDescriptor):
            box = f"{_POINTERS[value.base.dtype][1:]}{value.block_shape}"
            signature[name] = f"tensordesc<{box},{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
            if specialise and value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    language = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = language(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=launch.options)
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
