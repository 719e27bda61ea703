"""What choosing blocks does alike for whole sequences and for a decode step: count, and sum."""

import triton
import triton.language as tl

from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32


@triton.jit
def count_windows(position, SIZE: tl.constexpr, STRIDE: tl.constexpr, count):
    """Count the windows that lie wholly at or before each position, of ``count``."""
    return tl.minimum(tl.maximum(position + 1 - SIZE + STRIDE, 0) // STRIDE, count)


@triton.jit
def sum_run(
    q,
    q_ptr,
    q_mask,
    stride_qd,
    keys_ptr,
    stride_s,
    stride_d,
    boxes,
    b,
    h,
    first_key,
    begin,
    stop,
    whole,
    seen,
    factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP32: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Largest dot product of each row, and the sum of ``2 ** ((x - largest) * factor)``.

    A row takes its first ``seen`` keys into account, of those from ``begin`` to ``stop``; every row
    sees the first ``whole``. ``boxes`` hold the keys from ``first_key`` on, if ``USE_TMA``.
    """
    top = tl.full([q_ptr.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q_ptr.shape[0]], tl.float32)
    d = tl.arange(0, BLOCK_D)
    inner_end = begin
    if not FP32:  # float32 leaves no registers for a second loop
        inner_end += tl.maximum(tl.minimum(stop, whole) - begin, 0) // BLOCK_N * BLOCK_N
    for EDGE in tl.static_range(1 if FP32 else 0, 2):
        for start in range(inner_end if EDGE else begin, stop if EDGE else inner_end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            key_ptr = keys_ptr + n[None, :].to(tl.int64) * stride_s
            valid = (n < stop)[None, :]
            if FP32:
                logits = dot_fp32(q_ptr, q_mask, stride_qd, key_ptr, valid, stride_d, D, BLOCK_D)
            elif USE_TMA:
                keys = boxes.load([b, h, first_key + start, 0]).reshape(BLOCK_N, BLOCK_D)
                logits = tl.dot(q, tl.trans(keys))
            else:
                mask = valid & (d < D)[:, None]
                logits = tl.dot(q, tl.load(key_ptr + d[:, None] * stride_d, mask=mask, other=0.0))
            if EDGE:
                logits = tl.where(n[None, :] < seen[:, None], logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2((logits - base[:, None]) * factor)
            total = total * tl.exp2((top - base) * factor) + tl.sum(weights, 1)
            top = new_top
    return top, total
