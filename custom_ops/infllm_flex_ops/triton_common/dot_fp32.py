"""Exact float32 products without tensor cores, for kernels whose fast path is half precision."""

import triton
import triton.language as tl


@triton.jit
def dot_fp32(a, b, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Multiply float32 rows ``[M, 1]`` by columns ``[1, N]``, both ``RowTensor``s.

    A step loads 16 elements of D.

    Without tensor cores every thread holds its operands in registers; whole rows would spill.
    """
    STEP: tl.constexpr = 16
    product = tl.zeros([a.ptr.shape[0], b.ptr.shape[1]], tl.float32)
    for begin in range(0, BLOCK_D, STEP):
        d = begin + tl.arange(0, STEP)
        rows = tl.load(a.ptr + d[None, :] * a.d, mask=a.mask & (d < D)[None, :], other=0.0)
        columns = tl.load(b.ptr + d[:, None] * b.d, mask=b.mask & (d < D)[:, None], other=0.0)
        product = tl.dot(rows, columns, product, input_precision="ieee")
    return product
