"""Kernels that start while the kernel launched before them ends.

CUDA calls this programmatic dependent launch; Hopper and later have it. Such a kernel begins once
every program of the kernel before it has waited in its turn, or has ended. Three rules keep this
correct:

* Every program calls ``wait_for_previous`` before it returns, early returns included. When a kernel
  begins, all kernels but the one before it have therefore ended.
* Before the wait, a kernel reads only what was written before the kernel that precedes it. The
  first kernel of an operator reads nothing, since it does not know what precedes it.
* Before the wait, a kernel writes nothing.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from infllm_flex_ops import device

_FIRST_CAPABILITY = 90  # Hopper


def dependent_launch(x: Tensor) -> dict[str, Any]:
    """Return the options and the argument ``OVERLAP`` of a kernel on the device of ``x``."""
    if device.compute_capability(x) < _FIRST_CAPABILITY:
        return single_launch()
    return {"OVERLAP": True, "launch_pdl": True}


def single_launch() -> dict[str, Any]:
    """Return the argument ``OVERLAP`` of a kernel that starts when the one before it has ended."""
    return {"OVERLAP": False}


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Wait until the kernel launched before has ended; the next one may begin to wait, too."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
