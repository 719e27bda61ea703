"""Properties of the GPU, and of its Triton, that launches are chosen by."""

import functools
import warnings

import torch
from torch import Tensor

from infllm_flex_ops import torch_private

FLOAT8_CAPABILITY = 89  # Ada, the first whose tensor cores multiply float8
_HOPPER_MULTIPROCESSORS = 132
_GLUON_VERSIONS = ((3, 6), (3, 7), (3, 8))


def compute_capability(x: Tensor) -> int:
    """Return the capability of the device of ``x``: 90 on Hopper, 0 without CUDA."""
    return device_capability(x.device)


@torch_private.constant_to_graphs
def device_capability(device: torch.device) -> int:
    """Return the capability of a device: 90 on Hopper, 0 without CUDA."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@torch_private.constant_to_graphs
def count_multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a device: without CUDA 132, as on Hopper.

    Interpreted kernels, and those compiled ahead of time, then have the shapes of a GPU.
    """
    return _count_on_gpu(device) if device.type == "cuda" else _HOPPER_MULTIPROCESSORS


@functools.cache
def _count_on_gpu(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def knows_float8(x: Tensor) -> bool:
    """Whether the device converts to e4m3 and multiplies it."""
    return compute_capability(x) >= FLOAT8_CAPABILITY


def as_readable(x: Tensor) -> Tensor:
    """Return ``x``; in half precision, which holds e4m3 exactly, if its device knows no e4m3."""
    return x.half() if x.dtype == torch.float8_e4m3fn and not knows_float8(x) else x


def has_little_shared_memory(x: Tensor) -> bool:
    """Whether a program gets 99 KiB of shared memory at most, as on Ada; others have 163 up."""
    return compute_capability(x) in (75, 86, 89, 120, 121)


@functools.cache
def knows_gluon() -> bool:
    """Whether our Gluon kernels are written for this Triton. Gluon is not stable.

    With another Triton, slower kernels written in Triton itself compute the same, and one warning
    says that they do.
    """
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version in _GLUON_VERSIONS:
        return True
    known = ", ".join(".".join(map(str, known)) for known in _GLUON_VERSIONS)
    warnings.warn(
        f"infllm_flex has faster kernels for Hopper with Triton {known}; got {triton.__version__}: "
        "install one of those to use them",
        stacklevel=2,
    )
    return False
