"""Attention of one query per row to its blocks; the last program of a list joins the results."""

from typing import NamedTuple

import triton
import triton.language as tl

from infllm_flex_ops.block_attention.kernels.exact_reads import add_seen_keys
from infllm_flex_ops.triton_common.arrivals import is_last_program
from infllm_flex_ops.triton_common.pages import (
    count_queries,
    is_missing,
    locate_keys,
    view_keys,
    view_queries,
)
from infllm_flex_ops.triton_common.tensor_args import RowTensor, Softmax


class Join(NamedTuple):
    """How the results of a list are joined, at compile time.

    Attributes:
        PART: Elements of a value that a program sums, a power of two.
        SPLITS: Programs per list and part, padded to a power of two.
        CHUNK: Results that are added at once, a power of two.
    """

    PART: int
    SPLITS: int
    CHUNK: int


@triton.jit(do_not_specialize=["S", "width", "K", "dense_len"])
def attend_and_join_kernel(
    q,
    k,
    v,
    selected_ptr,
    pages,
    start_ptr,
    end_ptr,
    old_end_ptr,
    sums_ptr,
    maxima_ptr,
    counters_ptr,
    out_ptr,
    S,
    width,
    K,
    dense_len,
    qk_scale_log2,
    Hkv,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    JOIN: tl.constexpr,
):
    """Fill ``out [B, Hq, 1, D]`` by lists ``selected [B * Hkv, width]``.

    Over pages, fill ``out [T, Hq, D]`` by ``[T * Hkv, width]``, where each row has a query or none.

    A program takes some slots of a list, round-robin, and a part of the values. It leaves the
    weighted sum of these, ``sums [B * Hkv, parts, splits, ROWS, PART]``, and the maxima and sums of
    the weights, ``maxima [B * Hkv, parts, splits, 2, ROWS]``. A row is one query head of the group.
    ``end`` replaces ``old_end``, unless that is None.
    """
    split = tl.program_id(0)
    part = tl.program_id(1)
    head = tl.program_id(2)
    b = (head // Hkv).to(tl.int64)
    h = (head % Hkv).to(tl.int64)
    query = b  # counted over all rows
    if pages is not None:
        table = pages.table + b * pages.row
        query = tl.load(pages.query_start + b).to(tl.int64)
        if is_missing(pages, 0, count_queries(pages, b, 1)):
            return
    q = view_queries(q, pages, b)
    group = tl.arange(0, TILE.ROWS)
    d = tl.arange(0, TILE.BLOCK_D)
    q_ptr = q.ptr + (b * q.b + (h * SHAPE.G + group) * q.h)[:, None]
    q_mask = (group < SHAPE.G)[:, None]
    loaded = q_mask  # unused in float32
    if not TILE.FP32:
        loaded = tl.load(q_ptr + d[None, :] * q.d, mask=q_mask & (d < SHAPE.D)[None, :], other=0.0)
    rows = RowTensor(loaded, q_ptr, q_mask, q.d)
    row_start = 0
    if pages is None:
        row_start = tl.load(start_ptr + b)
    row_end = tl.load(end_ptr + b)
    if old_end_ptr is not None:
        tl.store(old_end_ptr + b, row_end, mask=(split == 0) & (part == 0) & (h == 0))
    position = row_end - row_start - 1
    own = tl.where(position < 0, -1, position // SHAPE.BLOCK_SIZE).to(tl.int32)
    used = tl.where((own < K) | (position + 1 < dense_len), own + 1, K)
    used = tl.minimum(used, width)
    splits = tl.num_programs(0)
    count = tl.maximum(tl.minimum(used, splits), 1)  # an empty list has a result, zero
    if split >= count:
        return
    k = view_keys(k, pages, b, h)
    v = view_keys(v, pages, b, h)
    e = part * JOIN.PART + tl.arange(0, JOIN.PART)
    exists = (e < SHAPE.D)[None, :]
    list_row = query * Hkv + h
    selected_ptr += list_row * width

    softmax = Softmax(
        m_i=tl.full([TILE.ROWS], -1e30, tl.float32),  # finite: a row without a key makes no NaN
        l_i=tl.full([TILE.ROWS], 0.0, tl.float32),
        acc=tl.full([TILE.ROWS, JOIN.PART], 0.0, tl.float32),
    )
    CHUNKS: tl.constexpr = (SHAPE.BLOCK_SIZE + TILE.BLOCK_N - 1) // TILE.BLOCK_N
    for i in tl.range(0, (used - split + splits - 1) // splits * CHUNKS):
        slot = split + i // CHUNKS * splits
        block = tl.load(selected_ptr + slot, mask=slot < used, other=-1)
        inner = i % CHUNKS * TILE.BLOCK_N + tl.arange(0, TILE.BLOCK_N)
        key = block.to(tl.int64) * SHAPE.BLOCK_SIZE + inner
        seen = (inner < SHAPE.BLOCK_SIZE) & (key >= 0)
        seen = seen & (key <= position) & (row_start + key < S)
        if pages is None:
            k_row = k.ptr + (row_start + key)[None, :] * k.s
            v_row = v.ptr + (row_start + key)[:, None] * v.s + e[None, :] * v.d
        else:
            begin = block.to(tl.int64) * SHAPE.BLOCK_SIZE + i % CHUNKS * TILE.BLOCK_N
            page, entry = locate_keys(begin, key, position, table, SHAPE.PAGE, SHAPE.BLOCK_SIZE)
            k_row = k.ptr + (page * k.b + entry * k.s)[None, :]
            v_row = v.ptr + (page * v.b + entry * v.s)[:, None] + e[None, :] * v.d
        softmax = add_seen_keys(
            softmax,
            rows,
            k_row,
            v_row,
            exists,
            k.d,
            seen,
            qk_scale_log2,
            SHAPE.D,
            TILE.BLOCK_D,
            TILE.FP32,
        )

    first = (head.to(tl.int64) * tl.num_programs(1) + part) * splits
    sums_ptr += first * (TILE.ROWS * JOIN.PART)
    maxima_ptr += first * (2 * TILE.ROWS)
    at = split * TILE.ROWS + group
    sum_ptr = sums_ptr + at[:, None] * JOIN.PART + tl.arange(0, JOIN.PART)[None, :]
    tl.store(sum_ptr, softmax.acc, mask=q_mask)
    maximum_ptr = maxima_ptr + split * (2 * TILE.ROWS) + group
    tl.store(maximum_ptr, softmax.m_i)
    tl.store(maximum_ptr + TILE.ROWS, softmax.l_i)
    if is_last_program(counters_ptr, head, part + 1, count):
        ROWS: tl.constexpr = TILE.ROWS
        out = join_splits(sums_ptr, maxima_ptr, count, SHAPE.G, ROWS, JOIN)
        out_row = (list_row * SHAPE.G + group)[:, None]
        tl.store(out_ptr + out_row * SHAPE.D + e[None, :], out, mask=q_mask & exists)


@triton.jit
def join_splits(
    sums_ptr, maxima_ptr, count, G: tl.constexpr, ROWS: tl.constexpr, JOIN: tl.constexpr
):
    """Weigh the results of ``count`` programs by their log-sum-exp: ``[ROWS, PART]``."""
    row = tl.arange(0, ROWS)
    every = tl.arange(0, JOIN.SPLITS)
    at = every[:, None] * (2 * ROWS) + row[None, :]
    used = (every < count)[:, None]
    m_every = tl.load(maxima_ptr + at, mask=used, other=-1e30, cache_modifier=".cg")
    l_every = tl.load(maxima_ptr + ROWS + at, mask=used, other=0.0, cache_modifier=".cg")
    m_all = tl.max(m_every, 0)
    total = tl.sum(l_every * tl.exp2(m_every - m_all[None, :]), 0)
    acc = tl.full([ROWS, JOIN.PART], 0.0, tl.float32)
    for begin in range(0, count, JOIN.CHUNK):
        split = begin + tl.arange(0, JOIN.CHUNK)
        exists = (split < count)[:, None] & (row < G)[None, :]
        place = split[:, None] * (2 * ROWS) + row[None, :]
        m_i = tl.load(maxima_ptr + place, mask=exists, other=-1e30, cache_modifier=".cg")
        place = split[:, None] * ROWS + row[None, :]
        place = place[:, :, None] * JOIN.PART + tl.arange(0, JOIN.PART)[None, None, :]
        part = tl.load(sums_ptr + place, mask=exists[:, :, None], other=0.0, cache_modifier=".cg")
        weight = tl.exp2(m_i - m_all[None, :])
        acc += tl.sum(part * weight[:, :, None], 0)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]
