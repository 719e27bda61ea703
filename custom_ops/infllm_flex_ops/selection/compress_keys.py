"""Mean-pool keys into compressed keys (the paper's "semantic kernels")."""

import torch
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.transforms import register_vmap


def num_windows(length: int, kernel_size: int, kernel_stride: int) -> int:
    """Count the pooling windows that lie wholly within ``length`` tokens.

    Branch-free, so that a symbolic length stays symbolic under ``torch.compile``.
    """
    return torch.sym_max(0, (length - kernel_size) // kernel_stride + 1)


@define_operator()
def compress_keys(k: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    """Average overlapping windows of keys; a trailing partial window is dropped.

    Sums run in a fixed order: first over the tokens of a stride, then over the strides of a window.
    The bits of a window therefore depend on its keys alone, not on the length, the batch or the
    window's position.

    Args:
        k: Keys ``[B, Hkv, S, D]``.
        kernel_size: Window length in tokens, a multiple of ``kernel_stride``.
        kernel_stride: Distance between window starts in tokens.

    Returns:
        Compressed keys ``[B, Hkv, C, D]`` in the dtype of ``k``, accumulated in at least float32,
        with ``C = max(0, (S - kernel_size) // kernel_stride + 1)``. No gradient flows.
    """
    return average_windows(
        k, num_windows(k.shape[2], kernel_size, kernel_stride), kernel_size, kernel_stride
    )


def average_windows(k: Tensor, C: int, kernel_size: int, kernel_stride: int) -> Tensor:
    """Average the first ``C`` windows of ``k [B, Hkv, S, D]``, which holds all of them.

    The order of the sums is defined here and nowhere else.

    Returns:
        ``[B, Hkv, C, D]`` in the dtype of ``k``.
    """
    B, Hkv, _, D = k.shape
    if C == 0:
        return k.new_empty(B, Hkv, 0, D)
    strides_per_window = kernel_size // kernel_stride
    num_strides = C + strides_per_window - 1
    accumulate = torch.promote_types(k.dtype, torch.float32)
    tokens = k[:, :, : num_strides * kernel_stride].to(accumulate)
    tokens = tokens.unflatten(2, (num_strides, kernel_stride))  # [B, Hkv, C', kernel_stride, D]
    stride_sums = tokens[:, :, :, 0].clone(memory_format=torch.contiguous_format)
    for offset in range(1, kernel_stride):
        stride_sums += tokens[:, :, :, offset]
    window_sums = stride_sums[:, :, :C].clone(memory_format=torch.contiguous_format)
    for offset in range(1, strides_per_window):
        window_sums += stride_sums[:, :, offset : offset + C]
    return (window_sums / kernel_size).to(k.dtype)


register_vmap(compress_keys)


@compress_keys.register_fake
def _(k: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    B, Hkv, S, D = k.shape
    return k.new_empty(B, Hkv, num_windows(S, kernel_size, kernel_stride), D)


cuda_launcher(compress_keys, "selection.kernels.compress_keys")
