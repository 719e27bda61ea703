"""Online softmax over windows of keys, shared by the prefill and decode kernels."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32
from infllm_flex_ops.triton_common.pages import RowPages, entry_offset
from infllm_flex_ops.triton_common.tensor_args import RowTensor


class KeySpan(NamedTuple):
    """Keys that a tile takes, in a kernel.

    Attributes:
        begin: First key.
        end: One past the last key.
        num_seen_by_all: Keys that every row of the tile sees.
    """

    begin: Any
    end: Any
    num_seen_by_all: Any


@triton.jit
def count_windows(position, SIZE: tl.constexpr, STRIDE: tl.constexpr, count):
    """Count the windows that lie wholly at or before each position, at most ``count``."""
    return tl.minimum(tl.maximum(position + 1 - SIZE + STRIDE, 0) // STRIDE, count)


@triton.jit
def softmax_over_keys(
    queries,
    keys,
    span,
    num_seen,
    qk_scale_log2,
    TILE: tl.constexpr,
    PAGING: tl.constexpr = None,
):
    """Maximum of each row's logits, and the sum of ``2 ** ((logit - maximum) * qk_scale_log2)``.

    Args:
        queries: Rows of a tile.
        keys: Keys of one KV head.
        span: The keys to take.
        num_seen: Keys that each row sees, ``[rows]``.
        qk_scale_log2: Factor on the logits.
        TILE: Sizes of the program.
        PAGING: How the keys lie in pages, or None.
    """
    begin, end, num_seen_by_all = span
    m_i = tl.full([queries.ptr.shape[0]], float("-inf"), tl.float32)
    l_i = tl.full([queries.ptr.shape[0]], 0.0, tl.float32)
    d = tl.arange(0, TILE.BLOCK_D)
    inner_end = begin
    if not TILE.FP32:  # float32 leaves no registers for a second loop
        inner = tl.maximum(tl.minimum(end, num_seen_by_all) - begin, 0)
        inner_end += inner // TILE.BLOCK_N * TILE.BLOCK_N
    for EDGE in tl.static_range(1 if TILE.FP32 else 0, 2):
        for start in range(inner_end if EDGE else begin, end if EDGE else inner_end, TILE.BLOCK_N):
            n = start + tl.arange(0, TILE.BLOCK_N)
            row = None
            if PAGING is not None:
                row = RowPages(keys.table, (n < end)[None, :])
            key_ptr = keys.view.ptr + entry_offset(keys.view, n[None, :], row, PAGING)
            valid = (n < end)[None, :]
            if TILE.FP32:
                columns = RowTensor(None, key_ptr, valid, keys.view.d)
                logits = dot_fp32(queries, columns, TILE.D, TILE.BLOCK_D)
            elif keys.desc is not None:
                box = keys.desc.load([keys.b, keys.h, keys.start + start, 0])
                x = box.reshape(TILE.BLOCK_N, TILE.BLOCK_D)
                logits = tl.dot(queries.loaded, tl.trans(x))
            else:
                mask = valid & (d < TILE.D)[:, None]
                x = tl.load(key_ptr + d[:, None] * keys.view.d, mask=mask, other=0.0)
                logits = tl.dot(queries.loaded, x)
            if EDGE:
                logits = tl.where(n[None, :] < num_seen[:, None], logits, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(logits, 1))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            weights = tl.exp2((logits - m_safe[:, None]) * qk_scale_log2)
            l_i = l_i * tl.exp2((m_i - m_safe) * qk_scale_log2) + tl.sum(weights, 1)
            m_i = m_new
    return m_i, l_i


@triton.jit
def logit_of_sum(m_i, l_i, qk_scale_log2):
    """The logit whose weight is the whole sum: a log-sum-exp before scaling; -inf for no key."""
    return m_i + tl.log2(tl.where(l_i == 0.0, 1.0, l_i)) / qk_scale_log2
