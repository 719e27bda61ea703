"""Score the blocks of a decode step: weights of windows, summed over the group, pooled on chip."""

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.select_cached_blocks.lse import merge_runs
from infllm_flex_ops.selection.kernels.window_sums import count_windows
from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32


@triton.jit(do_not_specialize=["n", "C", "C2", "columns", "runs", "run_keys", "split_blocks"])
def cached_score_kernel(
    q_ptr,
    keys_ptr,
    start_ptr,
    end_ptr,
    parts_ptr,
    scores_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    n,
    C,
    C2,
    columns,
    runs,
    run_keys,
    split_blocks,
    factor,
    dense_len,
    Hkv,
    G: tl.constexpr,
    D: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    COARSE_SIZE: tl.constexpr,
    COARSE_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    FITTING: tl.constexpr,
    RUNS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP32: tl.constexpr,
):
    """Fill ``scores [B * Hkv, n, columns]``, a run of blocks each: their best overlapping window.

    Windows that begin before a block are scored again for it: they are at hand, and products are
    not what a decode step waits for.
    """
    head = tl.program_id(1)
    tile = tl.program_id(2)
    b = (head // Hkv).to(tl.int64)
    h = (head % Hkv).to(tl.int64)
    length = (tl.load(end_ptr + b) - tl.load(start_ptr + b)).to(tl.int32)
    last = length - n + tl.minimum(tile * TOKENS + TOKENS, n) - 1
    begin = tl.program_id(0) * split_blocks
    num_scored = last // BLOCK_SIZE - LOCAL_BLOCKS  # the blocks after these are forced
    if (last + 1 < dense_len) | (last < FITTING) | (begin >= num_scored):
        return
    column = tl.arange(0, HEADS * TOKENS)  # heads outer, so that their sum stays in a thread
    group = column // TOKENS
    row = tile * TOKENS + column % TOKENS
    d = tl.arange(0, BLOCK_D)
    q_ptr += (b * stride_qb + (h * G + group) * stride_qh + row.to(tl.int64) * stride_qs)[None, :]
    q_mask = ((group < G) & (row < n))[None, :]
    if not FP32:
        q = tl.load(q_ptr + d[:, None] * stride_qd, mask=q_mask & (d < D)[:, None], other=0.0)
    at = (head.to(tl.int64) * tl.num_programs(2) + tile) * runs
    count = count_windows(last, COARSE_SIZE, COARSE_STRIDE, C2)
    lse = merge_runs(parts_ptr, at, count, run_keys, factor, HEADS, TOKENS, RUNS)
    shift = -factor * lse[None, :]

    keys_ptr += b * stride_kb + h * stride_kh
    token = tile * TOKENS + tl.arange(0, TOKENS)
    out_row = (head.to(tl.int64) * n + token) * columns
    i = tl.arange(0, BLOCK_N)
    slot = i % SLOTS
    for start in range(begin, tl.minimum(begin + split_blocks, num_scored), BLOCK_N // SLOTS):
        window = (start + i // SLOTS) * PER_BLOCK + slot - BEFORE
        valid = (window >= 0) & (window < C) & (slot < PER_BLOCK + BEFORE)
        key_ptr = keys_ptr + window.to(tl.int64)[:, None] * stride_ks
        if FP32:
            logits = dot_fp32(
                key_ptr, valid[:, None], stride_kd, q_ptr, q_mask, stride_qd, D, BLOCK_D
            )
        else:
            mask = valid[:, None] & (d < D)[None, :]
            logits = tl.dot(tl.load(key_ptr + d[None, :] * stride_kd, mask=mask, other=0.0), q)
        weights = tl.exp2(tl.fma(logits, factor, shift))
        if HEADS > G:
            weights = tl.where((group < G)[None, :], weights, 0.0)
        weight = tl.sum(tl.reshape(weights, [BLOCK_N, HEADS, TOKENS]), 1)
        weight = tl.where(weight == weight, tl.minimum(weight, 3.4028234663852886e38), 0.0)
        window_end = window * KERNEL_STRIDE + KERNEL_SIZE - 1
        seen = valid[:, None] & (window_end[:, None] <= (length - n + token)[None, :])
        weight = tl.where(seen, weight, -1.0)
        block = start + tl.arange(0, BLOCK_N // SLOTS)
        best = tl.max(tl.reshape(weight, [BLOCK_N // SLOTS, SLOTS, TOKENS]), 1)
        out_mask = ((block < num_scored) & (block < columns))[:, None] & (token < n)[None, :]
        tl.store(scores_ptr + out_row[None, :] + block[:, None], best, mask=out_mask)
