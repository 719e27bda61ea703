"""Normalise the scores of a decode step: log-sum-exp over runs of the coarse keys, in parallel."""

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.decode.tiles import point_at_queries, selects_nothing
from infllm_flex_ops.selection.kernels.kernel_args import HeadKeys
from infllm_flex_ops.selection.kernels.online_softmax import (
    KeySpan,
    count_windows,
    logit_of_sum,
    softmax_over_keys,
)
from infllm_flex_ops.triton_common.dependent_launch import wait_for_previous
from infllm_flex_ops.triton_common.issue_loads import issue_loads
from infllm_flex_ops.triton_common.pages import (
    RowPages,
    count_queries,
    entry_offset,
    row_length,
    view_keys,
    view_queries,
)
from infllm_flex_ops.triton_common.tensor_args import RowTensor, View


@triton.jit
def _load_step(keys, step, count, room, table, TILE: tl.constexpr, PAGING: tl.constexpr):
    """Load the keys ``[BLOCK_D, BLOCK_N]`` of a step, of ``count`` in all.

    A row's table has pages for ``room`` keys, which are looked up before ``count`` is known.
    """
    n = step * TILE.BLOCK_N + tl.arange(0, TILE.BLOCK_N)
    d = tl.arange(0, TILE.BLOCK_D)
    row = None
    if PAGING is not None:
        row = RowPages(table, n < room)
    offset = entry_offset(keys, n, row, PAGING)
    mask = (n < count)[None, :] & (d < TILE.D)[:, None]
    return tl.load(keys.ptr + offset[None, :] + d[:, None] * keys.d, mask=mask, other=0.0)


@triton.jit
def _softmax_of_step(q, x, step, num_seen, qk_scale_log2, TILE: tl.constexpr):
    """Maximum and sum of each row of ``q`` as ``softmax_over_keys`` gives them, of one step."""
    n = step * TILE.BLOCK_N + tl.arange(0, TILE.BLOCK_N)
    logits = tl.where(n[None, :] < num_seen[:, None], tl.dot(q, x), float("-inf"))
    m_i = tl.max(logits, 1)
    m_safe = tl.where(m_i == float("-inf"), 0.0, m_i)
    return m_i, tl.sum(tl.exp2((logits - m_safe[:, None]) * qk_scale_log2), 1)


@triton.jit
def _softmax_over_windows(
    queries,
    keys,
    position,
    last,
    C,
    qk_scale_log2,
    RULE: tl.constexpr,
    TILE: tl.constexpr,
    PAGING: tl.constexpr,
):
    """Maximum and sum of each row over the compressed keys up to ``last``."""
    end = count_windows(last, RULE.kernel_size, RULE.kernel_stride, C)
    num_seen = count_windows(position, RULE.kernel_size, RULE.kernel_stride, C)
    span = KeySpan(0, end, 0)
    return softmax_over_keys(queries, keys, span, num_seen, qk_scale_log2, TILE, PAGING)


@triton.jit(do_not_specialize=["n", "C", "C2", "run_keys"])
def cached_lse_kernel(
    q_ptr,
    keys_ptr,
    coarse_ptr,
    pages,
    start_ptr,
    end_ptr,
    partial_ptr,
    q_strides,
    keys_strides,
    coarse_strides,
    n,
    C,
    C2,
    run_keys,
    qk_scale_log2,
    dense_len,
    Hkv,
    RULE: tl.constexpr,
    TILE: tl.constexpr,
    PAGING: tl.constexpr,
    COARSE_PAGING: tl.constexpr,
    SINGLE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Fill ``partial [B * Hkv, tiles, runs, 2, HEADS * TOKENS]``, one run of coarse keys each.

    A run leaves the maximum and the sum of each row's softmax. Pointers and strides come apart: as
    views, in another order of the same instructions, the kernel spills for head dim 256 on sm_90.
    ``SINGLE``: a run is one step, whose keys are loaded with the query: in one piece as far as the
    tensor has room; in pages, when the length is known, those whose pages were looked up with it.
    """
    q = View(q_ptr, *q_strides)
    keys = View(keys_ptr, *keys_strides)
    coarse = View(coarse_ptr, *coarse_strides)
    run = tl.program_id(0)
    head = tl.program_id(1)
    tile = tl.program_id(2)
    b = (head // Hkv).to(tl.int64)
    h = (head % Hkv).to(tl.int64)
    wait_for_previous(OVERLAP)
    length = row_length(start_ptr, end_ptr, b)
    table = None
    if pages is not None:
        table = pages.table + b * pages.row
    q = view_queries(q, pages, b)
    n = count_queries(pages, b, n)
    last = length - n + tl.minimum(tile * TILE.TOKENS + TILE.TOKENS, n) - 1
    SIZE: tl.constexpr = RULE.coarse_size
    STRIDE: tl.constexpr = RULE.coarse_stride
    count = count_windows(last, SIZE, STRIDE, C2)
    row, row_ptr, has_query = point_at_queries(q, b, h, tile, n, TILE)
    position = length - n + row
    row_ptr = row_ptr[:, None]
    q_mask = has_query[:, None]
    loaded = q_mask  # unused in float32
    if not TILE.FP32:
        d = tl.arange(0, TILE.BLOCK_D)
        # Loaded together with the length, before that decides.
        loaded = tl.load(row_ptr + d[None, :] * q.d, mask=q_mask & (d < TILE.D)[None, :], other=0.0)
    x = q_mask  # unused unless there is a single step
    if SINGLE:
        loaded_keys = C2 if pages is None else count
        own = view_keys(coarse, pages, b, h)
        x = _load_step(own, run, loaded_keys, C2, table, TILE, COARSE_PAGING)
        if OVERLAP:
            loaded, x = issue_loads(loaded, x)
    queries = RowTensor(loaded, row_ptr, q_mask, q.d)
    is_idle = selects_nothing(pages, tile, n, last, dense_len, RULE, TILE)
    if is_idle | ((run > 0) & (run * run_keys >= count)):
        return

    num_seen = count_windows(position, SIZE, STRIDE, C2)
    if SINGLE:
        num_seen = tl.minimum(num_seen, count)
        m_i, l_i = _softmax_of_step(loaded, x, run, num_seen, qk_scale_log2, TILE)
    else:
        coarse_keys = HeadKeys(view_keys(coarse, pages, b, h), None, 0, 0, 0, table)
        num_seen_by_all = count_windows(length - n + tile * TILE.TOKENS, SIZE, STRIDE, C2)
        begin = run * run_keys
        span = KeySpan(begin, tl.minimum(begin + run_keys, count), num_seen_by_all)
        m_i, l_i = softmax_over_keys(
            queries, coarse_keys, span, num_seen, qk_scale_log2, TILE, COARSE_PAGING
        )
    first = length - n + tile * TILE.TOKENS
    # Rows that see no coarse key are normalised by the compressed keys.
    if (run == 0) & (first < SIZE - 1):
        last = tl.minimum(last, SIZE - 2)
        head_keys = HeadKeys(view_keys(keys, pages, b, h), None, 0, 0, 0, table)
        own_m_i, own_l_i = _softmax_over_windows(
            queries, head_keys, position, last, C, qk_scale_log2, RULE, TILE, PAGING
        )
        sees_none = position < SIZE - 1
        m_i = tl.where(sees_none, own_m_i, m_i)
        l_i = tl.where(sees_none, own_l_i, l_i)
    at = (head.to(tl.int64) * tl.num_programs(2) + tile) * tl.num_programs(0) + run
    partial_ptr += at * (2 * TILE.HEADS * TILE.TOKENS) + tl.arange(0, TILE.HEADS * TILE.TOKENS)
    tl.store(partial_ptr, m_i)
    tl.store(partial_ptr + TILE.HEADS * TILE.TOKENS, l_i)


@triton.jit
def merge_runs(
    partial_ptr, at, count, run_keys, qk_scale_log2, TILE: tl.constexpr, RUNS: tl.constexpr
):
    """Merge the runs that cover ``count`` coarse keys: the rows' log-sum-exp, before scaling.

    All runs are read at once: one after the other they would take longer than the scores.
    """
    COLUMNS: tl.constexpr = TILE.HEADS * TILE.TOKENS
    column = tl.arange(0, COLUMNS)
    run = tl.arange(0, RUNS)
    partial_ptr += at * (2 * COLUMNS)
    partial_ptr += run[:, None] * (2 * COLUMNS) + column[None, :]
    used = ((run == 0) | (run * run_keys < count))[:, None]
    m_runs = tl.load(partial_ptr, mask=used, other=float("-inf"))
    l_runs = tl.load(partial_ptr + COLUMNS, mask=used, other=0.0)
    m_i = tl.max(m_runs, 0)
    m_safe = tl.where(m_i == float("-inf"), 0.0, m_i)
    l_i = tl.sum(l_runs * tl.exp2((m_runs - m_safe[None, :]) * qk_scale_log2), 0)
    return logit_of_sum(m_i, l_i, qk_scale_log2)
