"""Tensor descriptors, by which Hopper's copy engine (TMA) loads boxes of a tensor.

A program then computes no addresses, and its warps do not all wait at a barrier for the keys.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from infllm_flex_ops.device import compute_capability

_ALIGNMENT = 16  # bytes: of a tensor's first element, and of its strides


def can_use_tma(*tensors: Tensor) -> bool:
    """Whether kernels load these tensors, ``[B, H, S, D]``, by TMA: on Hopper, where measured."""
    return all(compute_capability(x) == 90 and is_laid_out_for_tma(x) for x in tensors)


def is_laid_out_for_tma(x: Tensor) -> bool:
    """Whether the copy engine can load boxes of ``x [B, H, S, D]``."""
    if x.element_size() > 2 or x.numel() == 0 or x.stride(3) != 1:
        return False
    step = _ALIGNMENT // x.element_size()
    aligned = all(stride > 0 and stride % step == 0 for stride in _strides(x))
    return aligned and x.data_ptr() % _ALIGNMENT == 0


def describe(x: Tensor, rows: int) -> Any:
    """Describe ``x [B, H, S, D]`` as boxes ``[1, 1, rows, D]``; outside of ``x`` a box is zero.

    Args:
        x: A tensor that TMA can load. A box is a power of two wide, at least 16.
        rows: Rows of a box, a power of two.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), [*_strides(x), 1], [1, 1, rows, _box_width(x)])


def describe_for_gluon(x: Tensor, rows: int) -> Any:
    """Describe ``x`` as ``describe`` does, for kernels written in Gluon, which name layouts."""
    return _describe_for_gluon(x, list(x.shape), [*_strides(x), 1], [1, 1, rows, _box_width(x)])


def describe_strided(x: Tensor, rows: int, step: int) -> Any:
    """Describe ``x [B, H, S, D]`` to Gluon as boxes ``[1, 1, rows, 1, D]`` of every step-th row.

    Coordinates: batch row, head, first row // step, first row % step, 0. No box holds the rows of a
    head after its last whole step.
    """
    B, H, S, D = x.shape
    batch, head, token = _strides(x)
    shape, strides = [B, H, S // step, step, D], [batch, head, step * token, token, 1]
    return _describe_for_gluon(x, shape, strides, [1, 1, rows, 1, _box_width(x)])


def describe_groups(x: Tensor, num_groups: int, tokens: int) -> Any:
    """Describe ``x [B, H, S, D]`` as boxes of some tokens' rows in all heads of a group.

    Args:
        x: A tensor that TMA can load.
        num_groups: Number of groups of heads; divides ``H``. A box holds the rows of a group head
            after head, then rows of zeros up to a power of two of heads.
        tokens: Tokens of a box, a power of two.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    B, H, S, D = x.shape
    G = H // num_groups
    batch, head, token = _strides(x)
    box = [1, 1, triton.next_power_of_2(G), tokens, _box_width(x)]
    return TensorDescriptor(x, [B, num_groups, G, S, D], [batch, G * head, head, token, 1], box)


def describe_lines(x: Tensor, width: int) -> Any:
    """Describe a contiguous tensor as boxes of ``width`` consecutive elements."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x.view(-1, width), [1, width])


def _describe_for_gluon(x: Tensor, shape: list[int], strides: list[int], box: list[int]) -> Any:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(box, dtype)
    return TensorDescriptor(x, shape, strides, box, layout)


def _box_width(x: Tensor) -> int:
    return max(16, triton.next_power_of_2(x.shape[3]))


def _strides(x: Tensor) -> list[int]:
    """Strides of batch, heads and tokens. A dimension of one element may have any stride."""
    step = _ALIGNMENT // x.element_size()
    return [x.stride(i) if x.shape[i] > 1 else step for i in range(3)]
