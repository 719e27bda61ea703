"""Normalise the scores of a decode step: log-sum-exp over runs of the coarse keys, in parallel."""

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.window_sums import count_windows, sum_run


@triton.jit(do_not_specialize=["n", "C", "C2", "run_keys"])
def cached_lse_kernel(
    q_ptr,
    keys_ptr,
    coarse_ptr,
    start_ptr,
    end_ptr,
    parts_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_cb,
    stride_ch,
    stride_cs,
    stride_cd,
    n,
    C,
    C2,
    run_keys,
    factor,
    dense_len,
    Hkv,
    G: tl.constexpr,
    D: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    COARSE_SIZE: tl.constexpr,
    COARSE_STRIDE: tl.constexpr,
    FITTING: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP32: tl.constexpr,
):
    """Fill ``parts [B * Hkv, tiles, runs, 2, HEADS * TOKENS]``, one run of coarse keys each."""
    run = tl.program_id(0)
    head = tl.program_id(1)
    tile = tl.program_id(2)
    b = (head // Hkv).to(tl.int64)
    h = (head % Hkv).to(tl.int64)
    length = (tl.load(end_ptr + b) - tl.load(start_ptr + b)).to(tl.int32)
    last = length - n + tl.minimum(tile * TOKENS + TOKENS, n) - 1
    count = count_windows(last, COARSE_SIZE, COARSE_STRIDE, C2)
    if (last + 1 < dense_len) | (last < FITTING) | ((run > 0) & (run * run_keys >= count)):
        return
    column = tl.arange(0, HEADS * TOKENS)
    group = column // TOKENS
    row = tile * TOKENS + column % TOKENS
    position = length - n + row
    q_ptr += (b * stride_qb + (h * G + group) * stride_qh + row.to(tl.int64) * stride_qs)[:, None]
    q_mask = ((group < G) & (row < n))[:, None]
    q = q_mask  # unused in parts
    if not FP32:
        d = tl.arange(0, BLOCK_D)
        q = tl.load(q_ptr + d[None, :] * stride_qd, mask=q_mask & (d < D)[None, :], other=0.0)

    top, total = sum_run(
        q,
        q_ptr,
        q_mask,
        stride_qd,
        coarse_ptr + b * stride_cb + h * stride_ch,
        stride_cs,
        stride_cd,
        None,
        0,
        0,
        0,
        run * run_keys,
        tl.minimum(run * run_keys + run_keys, count),
        count_windows(length - n + tile * TOKENS, COARSE_SIZE, COARSE_STRIDE, C2),
        count_windows(position, COARSE_SIZE, COARSE_STRIDE, C2),
        factor,
        D,
        BLOCK_D,
        BLOCK_N,
        FP32,
        False,
    )
    first = length - n + tile * TOKENS
    if (run == 0) & (first < COARSE_SIZE - 1):  # some see no coarse key: the compressed ones serve
        few = count_windows(tl.minimum(last, COARSE_SIZE - 2), KERNEL_SIZE, KERNEL_STRIDE, C)
        own_top, own_total = sum_run(
            q,
            q_ptr,
            q_mask,
            stride_qd,
            keys_ptr + b * stride_kb + h * stride_kh,
            stride_ks,
            stride_kd,
            None,
            0,
            0,
            0,
            0,
            few,
            0,
            count_windows(position, KERNEL_SIZE, KERNEL_STRIDE, C),
            factor,
            D,
            BLOCK_D,
            BLOCK_N,
            FP32,
            False,
        )
        blind = position < COARSE_SIZE - 1
        top = tl.where(blind, own_top, top)
        total = tl.where(blind, own_total, total)
    at = (head.to(tl.int64) * tl.num_programs(2) + tile) * tl.num_programs(0) + run
    parts_ptr += at * (2 * HEADS * TOKENS) + column
    tl.store(parts_ptr, top)
    tl.store(parts_ptr + HEADS * TOKENS, total)


@triton.jit
def merge_runs(
    parts_ptr,
    at,
    count,
    run_keys,
    factor,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Join the runs that cover ``count`` coarse keys: the rows' log-sum-exp, before scaling.

    All are read at once: one after the other they would take longer than the scores themselves.
    """
    column = tl.arange(0, HEADS * TOKENS)
    run = tl.arange(0, RUNS)
    parts_ptr += at * (2 * HEADS * TOKENS)
    parts_ptr += run[:, None] * (2 * HEADS * TOKENS) + column[None, :]
    used = ((run == 0) | (run * run_keys < count))[:, None]
    tops = tl.load(parts_ptr, mask=used, other=float("-inf"))
    totals = tl.load(parts_ptr + HEADS * TOKENS, mask=used, other=0.0)
    top = tl.max(tops, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(totals * tl.exp2((tops - base[None, :]) * factor), 0)
    return top + tl.log2(tl.where(total == 0.0, 1.0, total)) / factor  # none seen: -inf
