"""Score the blocks of a decode step: weights of windows, summed over the group, pooled on chip."""

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.decode.lse import merge_runs
from infllm_flex_ops.selection.kernels.decode.tiles import point_at_queries, selects_nothing
from infllm_flex_ops.selection.kernels.online_softmax import count_windows
from infllm_flex_ops.triton_common.dependent_launch import wait_for_previous
from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32
from infllm_flex_ops.triton_common.issue_loads import issue_loads
from infllm_flex_ops.triton_common.pages import (
    RowPages,
    count_queries,
    entry_offset,
    row_length,
    view_keys,
    view_queries,
)
from infllm_flex_ops.triton_common.tensor_args import RowTensor


@triton.jit
def _place_windows(
    keys, table, start, end, C, WINDOWS: tl.constexpr, TILE: tl.constexpr, PAGING: tl.constexpr
):
    """Windows ``[BLOCK_N]`` of the blocks from ``start`` on, a step.

    Returns:
        The windows, which of them are to be scored, and their offsets from the pointer of the view
        ``keys``, int64.
    """
    i = tl.arange(0, TILE.BLOCK_N)
    if WINDOWS.SLOTS == WINDOWS.PER_BLOCK:  # windows that follow each other: one comparison each
        window = start * WINDOWS.PER_BLOCK + i
        exists = window < tl.minimum(end * WINDOWS.PER_BLOCK, C)
    else:
        block = start + i // WINDOWS.SLOTS
        slot = i % WINDOWS.SLOTS
        window = block * WINDOWS.PER_BLOCK + slot - WINDOWS.BEFORE
        exists = (block < end) & (slot < WINDOWS.PER_BLOCK + WINDOWS.BEFORE)
        exists = exists & (window >= 0) & (window < C)
    row = None
    if PAGING is not None:
        row = RowPages(table, exists)
    return window, exists, entry_offset(keys, window, row, PAGING)


@triton.jit
def _load_windows(keys, offset, exists, TILE: tl.constexpr):
    """Load windows ``[BLOCK_N, BLOCK_D]``."""
    d = tl.arange(0, TILE.BLOCK_D)
    mask = exists[:, None] & (d < TILE.D)[None, :]
    return tl.load(keys.ptr + offset[:, None] + d[None, :] * keys.d, mask=mask, other=0.0)


@triton.jit
def _load_ahead(
    keys,
    offset,
    table,
    start,
    end,
    C,
    WINDOWS: tl.constexpr,
    TILE: tl.constexpr,
    PAGING: tl.constexpr,
):
    """Load the windows of the step after that from ``start`` on; ``offset`` is looked up already.

    Returns:
        The windows, and the offsets of those of the next step.
    """
    STEP: tl.constexpr = TILE.BLOCK_N // WINDOWS.SLOTS
    start += STEP
    _, exists, _ = _place_windows(keys, table, start, end, C, WINDOWS, TILE, PAGING)
    loaded = _load_windows(keys, offset, exists, TILE)
    start += STEP
    _, _, offset = _place_windows(keys, table, start, end, C, WINDOWS, TILE, PAGING)
    return loaded, offset


@triton.jit
def _best_windows(
    logits,
    shift,
    window,
    valid,
    position,
    qk_scale_log2,
    RULE: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Weigh windows ``[BLOCK_N]``, and take the best of each block and of its tail.

    Weights are summed over the heads. A token without a window there gets -1.

    Returns:
        The best window of each block, ``[STEP, TOKENS]``, and the best of the ``WINDOWS.TAIL`` that
        reach into the next block.
    """
    STEP: tl.constexpr = TILE.BLOCK_N // WINDOWS.SLOTS
    weights = tl.exp2(tl.fma(logits, qk_scale_log2, shift))
    if TILE.HEADS > TILE.G:
        group = tl.arange(0, TILE.HEADS * TILE.TOKENS) // TILE.TOKENS
        weights = tl.where((group < TILE.G)[None, :], weights, 0.0)
    weight = tl.sum(tl.reshape(weights, [TILE.BLOCK_N, TILE.HEADS, TILE.TOKENS]), 1)
    weight = tl.where(weight == weight, tl.minimum(weight, 3.4028234663852886e38), 0.0)
    window_end = window * RULE.kernel_stride + RULE.kernel_size - 1
    seen = valid[:, None] & (window_end[:, None] <= position[None, :])
    weight = tl.where(seen, weight, -1.0)
    best = tl.max(tl.reshape(weight, [STEP, WINDOWS.SLOTS, TILE.TOKENS]), 1)
    tail = best  # unused where no window reaches into the next block
    if WINDOWS.TAIL > 0:
        slot = tl.arange(0, TILE.BLOCK_N) % WINDOWS.SLOTS
        in_tail = (slot >= WINDOWS.PER_BLOCK - WINDOWS.TAIL)[:, None]
        tail = tl.where(in_tail, weight, -1.0)
        tail = tl.max(tl.reshape(tail, [STEP, WINDOWS.SLOTS, TILE.TOKENS]), 1)
    return best, tail


@triton.jit
def _store_best(out_ptr, best, tail, start, num_scored, columns, has_query, WINDOWS: tl.constexpr):
    """Store what ``_best_windows`` returned for the blocks from ``start`` on.

    ``out_ptr [TOKENS]`` points to the first row of each token, of ``columns`` blocks.
    """
    block = start + tl.arange(0, best.shape[0])
    mask = ((block < num_scored) & (block < columns))[:, None] & has_query[None, :]
    out_ptr = out_ptr[None, :] + block[:, None]
    tl.store(out_ptr, best, mask=mask)
    if WINDOWS.TAIL > 0:
        tl.store(out_ptr + columns + 1, tail, mask=mask & (block + 1 < columns)[:, None])


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
    OVERLAP: tl.constexpr,
):
    """Fill ``scores [B * Hkv, n, 1 or 2, columns]``, a run of blocks each, by their best windows.

    The first row holds the best window that begins in each block, or overlaps it where windows that
    begin before are scored again. With a tail, the second row holds the best window that begins in
    the block before and reaches into the block; that of block 0 is not written.

    The keys of the first step, often the only one, are loaded while the kernel before still
    normalises. In pages, where a load waits for a look-up, each step's keys are loaded, and the
    pages after them looked up, a step ahead; in one piece Triton's pipeline loads more at once.
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
    is_idle = selects_nothing(pages, tile, num, last, dense_len, RULE, TILE)
    end = tl.where(is_idle, begin, tl.minimum(begin + split_blocks, num_scored))
    table = None
    if pages is not None:
        C = count_windows(length - 1, RULE.kernel_size, RULE.kernel_stride, C)  # those written
        q = view_queries(q, pages, b)
        table = pages.table + b * pages.row
    _, q_ptr, has_query = point_at_queries(q, b, h, tile, num, TILE)
    q_ptr, q_mask = q_ptr[None, :], has_query[None, :]
    if not TILE.FP32:
        d = tl.arange(0, TILE.BLOCK_D)
        loaded = tl.load(q_ptr + d[:, None] * q.d, mask=q_mask & (d < TILE.D)[:, None], other=0.0)
    keys = view_keys(keys, pages, b, h)
    STEP: tl.constexpr = TILE.BLOCK_N // WINDOWS.SLOTS
    AHEAD: tl.constexpr = pages is not None and not TILE.FP32
    x, offset = q_mask, q_mask  # unused in float32
    if not TILE.FP32:
        _, valid, offset = _place_windows(keys, table, begin, end, C, WINDOWS, TILE, PAGING)
        x = _load_windows(keys, offset, valid, TILE)
    if AHEAD:
        _, _, offset = _place_windows(keys, table, begin + STEP, end, C, WINDOWS, TILE, PAGING)

    wait_for_previous(OVERLAP)
    if begin >= end:
        return
    at = (head.to(tl.int64) * tl.num_programs(2) + tile) * runs
    count = count_windows(last, RULE.coarse_size, RULE.coarse_stride, C2)
    lse = merge_runs(partial_ptr, at, count, run_keys, qk_scale_log2, TILE, RUNS)
    if OVERLAP and not TILE.FP32:
        loaded, x = issue_loads(loaded, x)
    shift = -qk_scale_log2 * lse[None, :]
    token = tile * TILE.TOKENS + tl.arange(0, TILE.TOKENS)
    position = length - num + token
    STORED: tl.constexpr = 2 if WINDOWS.TAIL > 0 else 1
    out_ptr = scores_ptr + (head.to(tl.int64) * n + token) * columns * STORED
    ONE_LOOP: tl.constexpr = TILE.FP32 or AHEAD
    for LATER in tl.static_range(1 if ONE_LOOP else 0, 2):
        first = begin + STEP if LATER and not ONE_LOOP else begin
        for start in range(first, end if LATER else begin + STEP, STEP):
            window, valid, own = _place_windows(keys, table, start, end, C, WINDOWS, TILE, PAGING)
            if TILE.FP32:
                key_rows = RowTensor(None, keys.ptr + own[:, None], valid[:, None], keys.d)
                q_columns = RowTensor(None, q_ptr, q_mask, q.d)
                logits = dot_fp32(key_rows, q_columns, TILE.D, TILE.BLOCK_D)
            elif AHEAD:
                y, offset = _load_ahead(keys, offset, table, start, end, C, WINDOWS, TILE, PAGING)
                logits = tl.dot(x, loaded)
                x = y
            else:
                y = _load_windows(keys, own, valid, TILE) if LATER else x
                logits = tl.dot(y, loaded)
            best, tail = _best_windows(
                logits, shift, window, valid, position, qk_scale_log2, RULE, WINDOWS, TILE
            )
            _store_best(out_ptr, best, tail, start, num_scored, columns, token < num, WINDOWS)
