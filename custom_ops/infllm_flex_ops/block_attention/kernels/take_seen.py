"""Attention of rows that all see the same keys, and read no others."""

import triton
import triton.language as tl

from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32


@triton.jit
def take_seen(
    acc,
    top,
    total,
    q,
    q_ptr,
    q_mask,
    stride_qd,
    k_row,
    v_row,
    stride_kd,
    seen,
    factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FP32: tl.constexpr,
):
    """Take the keys that are ``seen [N]`` into the running softmax of the rows.

    ``k_row [1, N]`` points at keys, ``v_row [N, BLOCK_D]`` at the elements of values; what is not
    seen is not read, so nothing there, nan or unmapped, can matter. Half-precision queries take
    keys and values of another dtype in their own, as autocast leaves them.
    """
    d = tl.arange(0, BLOCK_D)
    if FP32:
        logits = dot_fp32(q_ptr, q_mask, stride_qd, k_row, seen[None, :], stride_kd, D, BLOCK_D)
    else:
        k_mask = seen[None, :] & (d < D)[:, None]
        k = tl.load(k_row + d[:, None] * stride_kd, mask=k_mask, other=0.0)
        logits = tl.dot(q, k.to(q.dtype))
    logits = tl.where(seen[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1) * factor)
    weights = tl.exp2(logits * factor - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    top = new_top
    v = tl.load(v_row, mask=seen[:, None] & (d < D)[None, :], other=0.0)
    if not FP32:
        v = v.to(q.dtype)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, total
