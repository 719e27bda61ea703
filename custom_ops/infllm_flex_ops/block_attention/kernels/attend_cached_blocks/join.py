"""Join the partial results of a query's list."""

import triton
import triton.language as tl

from infllm_flex_ops.triton_common.dependent_launch import wait_for_previous
from infllm_flex_ops.triton_common.pages import count_queries, is_missing


@triton.jit(do_not_specialize=["n", "splits"])
def join_kernel(
    parts_ptr,
    out_ptr,
    pages,
    n,
    splits,
    Hkv,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Weigh the parts of one query head by their log-sum-exp; 0 for a query without a key."""
    parts_of_d = (D + PART - 1) // PART
    group = tl.program_id(0) // parts_of_d
    token = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)  # b * Hkv + h
    d = tl.program_id(0) % parts_of_d * PART + tl.arange(0, PART)
    b = 0
    if pages is not None:
        b = head // Hkv
    num = count_queries(pages, b, n)
    if pages is None:
        row = (head * G + group) * n + token
    else:
        flat = tl.load(pages.query_start + b).to(tl.int64) + token
        row = (flat * Hkv + head % Hkv) * G + group
    wait_for_previous(OVERLAP)
    if is_missing(pages, token, num):
        return
    split = tl.arange(0, SPLITS)
    used = split < splits
    parts_ptr += ((head * n + token) * splits * ROWS + group) * (BLOCK_D + 2)
    part = parts_ptr + split * (ROWS * (BLOCK_D + 2))
    m_i = tl.load(part + BLOCK_D, mask=used, other=-1e30)
    l_i = tl.load(part + BLOCK_D + 1, mask=used, other=0.0)
    acc = tl.load(part[:, None] + d[None, :], mask=used[:, None], other=0.0)
    weight = tl.exp2(m_i - tl.max(m_i, 0))
    total = tl.sum(l_i * weight, 0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * D + d, out, mask=d < D)
