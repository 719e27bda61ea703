"""Shared by the kernel tests: the device, guarded memory, and the definitions as judges."""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter multiplies bfloat16 wrongly and truncates when it rounds to it.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]

_LIBC = ctypes.CDLL(None, use_errno=True)


def require_kernels() -> None:
    """Skip the calling test file unless its kernels can run: interpreted, or on a CUDA device."""
    pytest.importorskip("triton")
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip(
            "Triton kernels run on a CUDA device, or on the CPU under TRITON_INTERPRET=1",
            allow_module_level=True,
        )


def run_on_device(launch: Callable[..., Any], *args: Any) -> Any:
    """Launch a kernel with its tensors moved to the device, and bring the results back."""
    result = launch(*(x.to(DEVICE) if isinstance(x, Tensor) else x for x in args))
    return result.cpu() if isinstance(result, Tensor) else tuple(x.cpu() for x in result)


def fenced(x: Tensor) -> Tensor:
    """Copy a CPU tensor flush against an unmapped page: a read past its end ends the process."""
    nbytes = x.numel() * x.element_size()
    pages = -(-nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    guard = ctypes.c_void_p(address + pages * mmap.PAGESIZE)
    if _LIBC.mprotect(guard, mmap.PAGESIZE, mmap.PROT_READ & 0):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    if not nbytes:
        return x.clone()
    offset = pages * mmap.PAGESIZE - nbytes
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset)
    return copy.view(x.shape).copy_(x)


@contextmanager
def fenced_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fence what launchers allocate, and fill it with NaN or the largest integer."""
    empty, zeros = torch.empty, torch.zeros

    def poisoned(*shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        x = empty(*shape, dtype=dtype, device=device)
        return fenced(x.fill_(torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max))

    def zeroed(*shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        return fenced(zeros(*shape, dtype=dtype, device=device))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        patch.setattr(torch, "zeros", zeroed)
        yield


def far_apart(x: Tensor, dim: int) -> Tensor:
    """Copy ``x`` so that its steps along ``dim`` overflow 32-bit offsets, in untouched memory."""
    step = (1 << 31) // max(1, x.shape[dim] - 1) + 8
    stride = list(x.contiguous().stride())
    room = x.numel()
    stride[dim] = max(step, room)
    extent = sum((n - 1) * s for n, s in zip(x.shape, stride, strict=True)) + 1
    if DEVICE == "cuda":
        memory = torch.empty(extent, dtype=x.dtype, device=DEVICE)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        pages = mmap.mmap(-1, extent * x.element_size(), flags=flags)
        memory = torch.frombuffer(pages, dtype=x.dtype, count=extent)
    return memory.as_strided(x.shape, stride).copy_(x)
