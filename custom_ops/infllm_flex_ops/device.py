"""Which GPU, and by which Triton, a launch is for."""

import functools
import warnings

import torch
from torch import Tensor

from infllm_flex_ops import torch_private

FLOAT8_CAPABILITY = 89  # Ada: from here on tensor cores multiply float8
_GLUON_VERSIONS = ((3, 6), (3, 7))


def compute_capability(x: Tensor) -> int:
    """Major and minor in one number, 90 on Hopper; 0 where there is no CUDA device to ask."""
    return device_capability(x.device)


@torch_private.constant_to_graphs
def device_capability(device: torch.device) -> int:
    """The same of a device; a constant to graphs."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def knows_float8(x: Tensor) -> bool:
    """Whether the device converts to e4m3, and multiplies it."""
    return compute_capability(x) >= FLOAT8_CAPABILITY


def has_little_shared_memory(x: Tensor) -> bool:
    """Whether a program gets at most 99 KiB, as on Ada and on desktop GPUs, instead of 163 up."""
    return compute_capability(x) in (75, 86, 89, 120, 121)


@functools.cache
def knows_gluon() -> bool:
    """Whether this Triton's Gluon, which may still change, is one that our kernels are written for.

    If it is not, the kernels written in Triton itself do the same, in more time, and a warning
    says so once.
    """
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version in _GLUON_VERSIONS:
        return True
    known = " and ".join(".".join(map(str, known)) for known in _GLUON_VERSIONS)
    warnings.warn(
        f"infllm_flex attends faster on Hopper with Triton {known} than with {triton.__version__}, "
        "whose Gluon it does not know",
        stacklevel=2,
    )
    return False
