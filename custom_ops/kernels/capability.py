"""Which GPU a launch is for."""

import torch
from torch import Tensor


def compute_capability(x: Tensor) -> int:
    """Major and minor in one number, 90 on Hopper; 0 where there is no CUDA device to ask."""
    return device_capability(x.device)


def device_capability(device: torch.device) -> int:
    """The same of a device; a constant to graphs."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


# What torch.compiler.assume_constant_result says, without importing Dynamo.
device_capability._dynamo_marked_constant = True


def has_little_shared_memory(x: Tensor) -> bool:
    """Whether a program gets at most 99 KiB, as on Ada and on desktop GPUs, instead of 163 up."""
    return compute_capability(x) in (75, 86, 89, 120, 121)
