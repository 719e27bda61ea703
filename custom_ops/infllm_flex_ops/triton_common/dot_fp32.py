"""Exact float32 products without tensor cores, for kernels whose fast path is half precision."""

import triton
import triton.language as tl


@triton.jit
def dot_fp32(
    a_ptr, a_mask, stride_ad, b_ptr, b_mask, stride_bd, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Multiply float32 rows ``a [M, 1]`` by columns ``b [1, N]``, loading 16 elements of D a step.

    Without tensor cores every thread holds its operands in registers; whole rows would spill.
    """
    STEP: tl.constexpr = 16
    product = tl.zeros([a_ptr.shape[0], b_ptr.shape[1]], tl.float32)
    for begin in range(0, BLOCK_D, STEP):
        d = begin + tl.arange(0, STEP)
        a = tl.load(a_ptr + d[None, :] * stride_ad, mask=a_mask & (d < D)[None, :], other=0.0)
        b = tl.load(b_ptr + d[:, None] * stride_bd, mask=b_mask & (d < D)[:, None], other=0.0)
        product = tl.dot(a, b, product, input_precision="ieee")
    return product
