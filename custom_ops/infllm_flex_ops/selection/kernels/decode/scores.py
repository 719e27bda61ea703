"""Score the blocks of a decode step: weights of windows, summed over the group, pooled on chip."""

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.decode.lse import merge_runs
from infllm_flex_ops.selection.kernels.online_softmax import count_windows
from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32
from infllm_flex_ops.triton_common.pages import (
    RowPages,
    count_queries,
    entry_offset,
    is_missing,
    row_length,
    view_keys,
    view_queries,
)
from infllm_flex_ops.triton_common.tensor_args import RowTensor


@triton.jit(do_not_specialize=["n", "C", "C2", "columns", "runs", "run_keys", "split_blocks"])
def cached_score_kernel(
    q,
    keys,
    pages,
    start_ptr,
    end_ptr,
    partial_ptr,
    scores_ptr,
    n,
    C,
    C2,
    columns,
    runs,
    run_keys,
    split_blocks,
    qk_scale_log2,
    dense_len,
    Hkv,
    RULE: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILE: tl.constexpr,
    RUNS: tl.constexpr,
    PAGING: tl.constexpr,
):
    """Fill ``scores [B * Hkv, n, columns]``, a run of blocks each: their best overlapping window.

    Windows that begin before a block are scored again for it: their keys are at hand, and a decode
    step does not wait for products.
    """
    head = tl.program_id(1)
    tile = tl.program_id(2)
    b = (head // Hkv).to(tl.int64)
    h = (head % Hkv).to(tl.int64)
    length = row_length(start_ptr, end_ptr, b)
    num = count_queries(pages, b, n)
    last = length - num + tl.minimum(tile * TILE.TOKENS + TILE.TOKENS, num) - 1
    begin = tl.program_id(0) * split_blocks
    num_scored = last // RULE.block_size - RULE.local_blocks  # later blocks are forced
    is_full = (last + 1 < dense_len) | (last < RULE.num_selected * RULE.block_size)
    is_full = is_missing(pages, tile * TILE.TOKENS, num) | is_full
    if pages is not None:
        C = count_windows(length - 1, RULE.kernel_size, RULE.kernel_stride, C)  # those written
        q = view_queries(q, pages, b)
    if is_full | (begin >= num_scored):
        return
    column = tl.arange(0, TILE.HEADS * TILE.TOKENS)
    group = column // TILE.TOKENS
    row = tile * TILE.TOKENS + column % TILE.TOKENS
    d = tl.arange(0, TILE.BLOCK_D)
    q_row = b * q.b + (h * TILE.G + group) * q.h + row.to(tl.int64) * q.s
    q_ptr = q.ptr + q_row[None, :]
    q_mask = ((group < TILE.G) & (row < num))[None, :]
    if not TILE.FP32:
        d_mask = (d < TILE.D)[:, None]
        loaded = tl.load(q_ptr + d[:, None] * q.d, mask=q_mask & d_mask, other=0.0)
    at = (head.to(tl.int64) * tl.num_programs(2) + tile) * runs
    count = count_windows(last, RULE.coarse_size, RULE.coarse_stride, C2)
    lse = merge_runs(partial_ptr, at, count, run_keys, qk_scale_log2, TILE, RUNS)
    shift = -qk_scale_log2 * lse[None, :]

    keys = view_keys(keys, pages, b, h)
    token = tile * TILE.TOKENS + tl.arange(0, TILE.TOKENS)
    out_row = (head.to(tl.int64) * n + token) * columns
    STEP: tl.constexpr = TILE.BLOCK_N // WINDOWS.SLOTS
    i = tl.arange(0, TILE.BLOCK_N)
    slot = i % WINDOWS.SLOTS
    for start in range(begin, tl.minimum(begin + split_blocks, num_scored), STEP):
        window = (start + i // WINDOWS.SLOTS) * WINDOWS.PER_BLOCK + slot - WINDOWS.BEFORE
        valid = (window >= 0) & (window < C) & (slot < WINDOWS.PER_BLOCK + WINDOWS.BEFORE)
        pages_of_windows = None
        if pages is not None:
            pages_of_windows = RowPages(pages.table + b * pages.row, valid)
        key_ptr = keys.ptr + entry_offset(keys, window, pages_of_windows, PAGING)[:, None]
        if TILE.FP32:
            key_rows = RowTensor(None, key_ptr, valid[:, None], keys.d)
            q_columns = RowTensor(None, q_ptr, q_mask, q.d)
            logits = dot_fp32(key_rows, q_columns, TILE.D, TILE.BLOCK_D)
        else:
            mask = valid[:, None] & (d < TILE.D)[None, :]
            x = tl.load(key_ptr + d[None, :] * keys.d, mask=mask, other=0.0)
            logits = tl.dot(x, loaded)
        weights = tl.exp2(tl.fma(logits, qk_scale_log2, shift))
        if TILE.HEADS > TILE.G:
            weights = tl.where((group < TILE.G)[None, :], weights, 0.0)
        weight = tl.sum(tl.reshape(weights, [TILE.BLOCK_N, TILE.HEADS, TILE.TOKENS]), 1)
        weight = tl.where(weight == weight, tl.minimum(weight, 3.4028234663852886e38), 0.0)
        window_end = window * RULE.kernel_stride + RULE.kernel_size - 1
        seen = valid[:, None] & (window_end[:, None] <= (length - num + token)[None, :])
        weight = tl.where(seen, weight, -1.0)
        block = start + tl.arange(0, STEP)
        best = tl.max(tl.reshape(weight, [STEP, WINDOWS.SLOTS, TILE.TOKENS]), 1)
        out_mask = ((block < num_scored) & (block < columns))[:, None] & (token < num)[None, :]
        tl.store(scores_ptr + out_row[None, :] + block[:, None], best, mask=out_mask)
