"""Lower FlexAttention for a GPU in a process without one; nothing can be run.

Dynamo traces on the CPU. Its graphs are relabelled as CUDA before Inductor lowers them, and device
properties are replaced, for the whole process. This uses private parts of PyTorch 2.11 to 2.13.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
import torch._functorch.config
import torch._higher_order_ops.flex_attention
import torch._inductor.compile_fx
import torch._inductor.config
import torch._inductor.fx_utils
import torch._inductor.graph
import torch.nn.attention.flex_attention as flex
import triton
from torch._dynamo import device_interface
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.kernel.flex.common import construct_strides
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget


class _CapturedError(Exception):
    """Ends lowering once the sources are captured; nothing can be run."""


def pretend(capability: int) -> None:
    """Pretend one GPU of this compute capability, such as 90."""
    major, minor = divmod(capability, 10)
    shared = (163 if capability == 80 else 227) << 10
    known = {
        "major": major,
        "multi_processor_count": 132,
        "regs_per_multiprocessor": 65536,
        "max_threads_per_multi_processor": 2048,
        "max_threads_per_block": 1024,
        "warp_size": 32,
    }
    properties = types.SimpleNamespace(
        name="pretended",
        minor=minor,
        total_memory=1 << 37,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=shared,
        shared_memory_per_multiprocessor=shared + 1024,
        L2_cache_size=50 << 20,
        gcnArchName="",
        **known,
    )

    def answer(value: Any) -> Any:
        return staticmethod(lambda *args, **kwargs: value)

    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda *args, **kwargs: properties
    cuda.get_device_capability = lambda *args, **kwargs: (major, minor)
    cuda.current_device, cuda.device_count = lambda: 0, lambda: 1
    cuda._lazy_init = lambda: None
    torch.version.cuda = "13.0"
    hints = DeviceProperties(type="cuda", index=0, cc=capability, **known)
    DeviceProperties.create = classmethod(lambda cls, device: hints)
    interface: Any = device_interface.get_interface_for_device("cuda")
    for owner in (interface, interface.Worker):
        owner.get_device_properties = answer(properties)
        owner.current_device = answer(0)
    interface.is_available = interface.is_triton_capable = answer(True)
    interface.device_count = answer(1)
    interface.get_compute_capability = answer(capability)
    interface.raise_if_triton_unavailable = answer(None)
    _pretend_to_triton(capability, shared)
    _pretend_to_inductor()


def _pretend_to_triton(capability: int, shared: int) -> None:
    limits = {"max_shared_mem": shared, "multiprocessor_count": 132}
    limits |= {"max_num_regs": 65536, "warpSize": 32}
    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_device_interface=lambda: torch.cuda,
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_device_capability=lambda device=None: divmod(capability, 10),
        is_active=lambda: True,
        map_python_to_cpp_type=lambda kind: "int",
        utils=types.SimpleNamespace(get_device_properties=lambda device: limits),
        launcher_cls=object,
    )
    triton.runtime.driver.set_active(driver)


def _pretend_to_inductor() -> None:
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.force_disable_caches = True
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._inductor.compile_fx._check_triton_bf16_support = lambda graph: None
    torch._inductor.fx_utils.FakeTensorUpdater.incremental_update = lambda self: 0
    flex._validate_device = lambda *args: None
    take = flex._apply_kernel_options

    def options_of_a_gpu(*args: Any, **kwargs: Any) -> Any:
        return {**take(*args, **kwargs), "OUTPUT_LOGSUMEXP": torch.is_grad_enabled()}

    flex._apply_kernel_options = options_of_a_gpu
    higher_order: Any = sys.modules["torch._higher_order_ops.flex_attention"]
    permute = higher_order._permute_strides

    def permuted(out: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
        if out.device.type != "cuda":
            return permute(out, strides)
        order = sorted(range(len(strides)), key=lambda i: int(strides[i]))
        return out.new_empty(out.shape).as_strided(out.shape, construct_strides(out.shape, order))

    higher_order._permute_strides = permuted


def lower(function: Any, *args: Any) -> list[str]:
    """Return the sources of both passes of a function of fake CPU tensors that need gradients."""
    sources: list[str] = []

    def capture(self: Any, *args: Any, **kwargs: Any) -> Any:
        code = self.codegen()[0]
        sources.append(getattr(code, "value", code))
        raise _CapturedError

    torch._inductor.graph.GraphLowering.compile_to_module = capture

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
        _relabel(graph, mode)
        try:
            with torch._guards.tracing(torch._guards.TracingContext(mode)):
                moved = [_moved(x, mode) for x in inputs]
                torch._inductor.compile_fx.compile_fx_inner(graph, moved)
        except Exception as error:
            if not _is_captured(error):
                raise
        return _nothing_to_run

    backend = aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, decompositions=select_decomp_table
    )
    torch._dynamo.reset()
    try:
        torch.compile(function, fullgraph=True, dynamic=False, backend=backend)(*args)
    except Exception as error:
        if not _is_captured(error):
            raise
    return sources


def _nothing_to_run(*args: Any) -> Any:
    raise _CapturedError


def _is_captured(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, _CapturedError):
        error = error.__cause__ or error.__context__ or getattr(error, "inner_exception", None)
    return error is not None


def _relabel(graph: torch.fx.GraphModule, mode: FakeTensorMode) -> None:
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
            value = node.meta.get("val")
            if isinstance(value, tuple | list):
                node.meta["val"] = type(value)(_moved(x, mode) for x in value)
            elif value is not None:
                node.meta["val"] = _moved(value, mode)


def _moved(x: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    with mode:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
