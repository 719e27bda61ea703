"""Attention of rows that all see the same keys and read no others."""

import triton
import triton.language as tl

from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32
from infllm_flex_ops.triton_common.issue_loads import issue_loads
from infllm_flex_ops.triton_common.tensor_args import RowTensor, Softmax


@triton.jit
def add_seen_keys(
    softmax,
    q,
    k_row,
    v_row,
    stride_kd,
    seen,
    qk_scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FP32: tl.constexpr,
    TOGETHER: tl.constexpr = False,
):
    """Add the keys that are ``seen [N]`` to the running softmax of the rows ``q``, a ``RowTensor``.

    ``k_row [1, N]`` points at keys, ``v_row [N, BLOCK_D]`` at the elements of values. Unseen keys
    are not read, so that nothing there, NaN or unmapped, can matter. Keys and values of another
    dtype, as autocast leaves them, are converted to that of half-precision queries. ``TOGETHER``
    loads values and keys at once: outside a loop, which Triton would pipeline.
    """
    acc, m_i, l_i = softmax
    d = tl.arange(0, BLOCK_D)
    if FP32:
        logits = dot_fp32(q, RowTensor(None, k_row, seen[None, :], stride_kd), D, BLOCK_D)
    else:
        k_mask = seen[None, :] & (d < D)[:, None]
        k = tl.load(k_row + d[:, None] * stride_kd, mask=k_mask, other=0.0)
        if TOGETHER:
            v = tl.load(v_row, mask=seen[:, None] & (d < D)[None, :], other=0.0)
            k, v = issue_loads(k, v)
        logits = tl.dot(q.loaded, k.to(q.loaded.dtype))
    logits = tl.where(seen[None, :], logits, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(logits, 1) * qk_scale_log2)
    weights = tl.exp2(logits * qk_scale_log2 - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(weights, 1)
    if FP32 or not TOGETHER:
        v = tl.load(v_row, mask=seen[:, None] & (d < D)[None, :], other=0.0)
    if not FP32:
        v = v.to(q.loaded.dtype)
    acc = tl.dot(weights.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return Softmax(acc, m_new, l_i)
