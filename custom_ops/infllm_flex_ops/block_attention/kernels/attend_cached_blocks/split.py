"""Attention of one query to some of its blocks, where they lie in the cache."""

from typing import NamedTuple

import triton
import triton.language as tl

from infllm_flex_ops.block_attention.kernels.exact_reads import add_seen_keys
from infllm_flex_ops.triton_common.dependent_launch import wait_for_previous
from infllm_flex_ops.triton_common.pages import (
    count_queries,
    is_missing,
    view_keys,
    view_queries,
)
from infllm_flex_ops.triton_common.tensor_args import RowTensor, Softmax, View


class Shape(NamedTuple):
    """Compile-time sizes of the problem.

    Attributes:
        G: Query heads per KV head.
        D: Head dim.
        BLOCK_SIZE: Keys per block.
        PAGE: Keys of a page; 0 for a cache in one piece.
    """

    G: int
    D: int
    BLOCK_SIZE: int
    PAGE: int


class Tile(NamedTuple):
    """Compile-time sizes of a program.

    Attributes:
        ROWS: The query heads per KV head, padded to a power of two.
        BLOCK_N: Keys per step, a power of two.
        BLOCK_D: The head dim, padded to a power of two.
        FP32: Multiply float32 exactly, without tensor cores.
    """

    ROWS: int
    BLOCK_N: int
    BLOCK_D: int
    FP32: bool


@triton.jit
def _list_slots(
    selected_ptr, stride, slot, W, position, table, SHAPE: tl.constexpr, SLOTS: tl.constexpr
):
    """Load some ``slot [SLOTS]`` of a list, and look up their blocks' pages, all at once.

    Returns:
        The blocks, -1 in unused slots; their pages, where a block lies in one; one past the last
        slot that is used.
    """
    block = tl.load(selected_ptr + slot * stride, mask=slot < W, other=-1)
    page = block  # unused
    if SHAPE.PAGE > 0 and SHAPE.PAGE % SHAPE.BLOCK_SIZE == 0:
        first = block.to(tl.int64) * SHAPE.BLOCK_SIZE
        exists = (block >= 0) & (first <= position)
        page = tl.load(table + first // SHAPE.PAGE, mask=exists, other=0)
    end = tl.max(tl.where(block >= 0, tl.arange(0, SLOTS) + 1, 0), 0)
    return block, page, end


@triton.jit
def _pick(x, i, SLOTS: tl.constexpr):
    """Element ``i`` of ``x [SLOTS]``. Lanes pass it on, and no load waits for another one."""
    return tl.sum(tl.where(tl.arange(0, SLOTS) == i, x, 0), 0)


@triton.jit
def _point_at_keys(
    k, v, first, page, row_start, position, table, SHAPE: tl.constexpr, TILE: tl.constexpr
):
    """Pointers to the keys ``[1, BLOCK_N]`` from ``first`` on, and to the elements of their values.

    All that depends on the step is a scalar wherever its keys lie side by side.
    """
    n = tl.arange(0, TILE.BLOCK_N)
    d = tl.arange(0, TILE.BLOCK_D)
    if SHAPE.PAGE > 0 and SHAPE.PAGE % SHAPE.BLOCK_SIZE != 0:
        key = first + n
        at = tl.load(table + key // SHAPE.PAGE, mask=(key >= 0) & (key <= position), other=0)
        k_at = at.to(tl.int64) * k.b + key % SHAPE.PAGE * k.s
        v_at = at.to(tl.int64) * v.b + key % SHAPE.PAGE * v.s
    else:
        k_first = k.ptr
        v_first = v.ptr
        entry = row_start + first
        if SHAPE.PAGE > 0:
            k_first += page.to(tl.int64) * k.b
            v_first += page.to(tl.int64) * v.b
            entry = first % SHAPE.PAGE
        if TILE.BLOCK_D > 128:  # no registers for what the steps have in common
            index = entry + n
        else:
            k_first += entry * k.s
            v_first += entry * v.s
            index = n.to(tl.int64)
        k = View(k_first, k.b, k.h, k.s, k.d)
        v = View(v_first, v.b, v.h, v.s, v.d)
        k_at = index * k.s
        v_at = index * v.s
    return k.ptr + k_at[None, :], v.ptr + v_at[:, None] + d[None, :] * v.d


@triton.jit
def _see_keys(block, chunk, row_start, position, S, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """First key of a ``chunk`` of a block, int64, and which of its keys ``[BLOCK_N]`` are seen.

    An unused slot holds block -1. One comparison a key decides.
    """
    start = chunk * TILE.BLOCK_N
    first = block.to(tl.int64) * SHAPE.BLOCK_SIZE + start
    count = tl.minimum(position + 1, S - row_start) - first
    count = tl.where(block < 0, 0, tl.minimum(count, SHAPE.BLOCK_SIZE - start))
    return first, tl.arange(0, TILE.BLOCK_N) < tl.maximum(count, 0).to(tl.int32)


@triton.jit(do_not_specialize=["n", "S", "W", "slots"])
def split_kernel(
    q,
    k,
    v,
    selected,
    pages,
    start_ptr,
    end_ptr,
    parts_ptr,
    n,
    S,
    W,
    slots,
    qk_scale_log2,
    Hkv,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    SLOTS: tl.constexpr,
    MORE: tl.constexpr,
    SINGLE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Fill ``parts [B * Hkv, n, splits, ROWS, BLOCK_D + 2]``: weighted values, maximum, sum.

    A row is one query head of the group. Programs take the slots of a list round-robin, so that the
    unused slots at its end are spread evenly. A program looks up ``SLOTS`` of its blocks, and their
    pages, before it walks them. ``SINGLE``: each takes one step, and on Hopper loads its keys and
    values together.
    """
    split = tl.program_id(0)
    token = tl.program_id(1)
    head = tl.program_id(2)
    b = (head // Hkv).to(tl.int64)
    h = (head % Hkv).to(tl.int64)
    wait_for_previous(OVERLAP)
    row_start = 0
    table = None
    if pages is None:
        row_start = tl.load(start_ptr + b)
    else:
        table = pages.table + b * pages.row
    num = count_queries(pages, b, n)
    if is_missing(pages, token, num):
        return
    position = tl.load(end_ptr + b) - row_start - num + token
    q = view_queries(q, pages, b)
    selected = view_queries(selected, pages, b)
    selected_ptr = selected.ptr + (
        b * selected.b + h * selected.h + token.to(tl.int64) * selected.s
    )
    splits = tl.num_programs(0)
    group = tl.arange(0, TILE.ROWS)
    d = tl.arange(0, TILE.BLOCK_D)
    q_ptr = q.ptr + (b * q.b + (h * SHAPE.G + group) * q.h + token.to(tl.int64) * q.s)[:, None]
    q_mask = (group < SHAPE.G)[:, None]
    loaded = q_mask  # unused in float32
    if not TILE.FP32:
        loaded = tl.load(q_ptr + d[None, :] * q.d, mask=q_mask & (d < SHAPE.D)[None, :], other=0.0)
    rows = RowTensor(loaded, q_ptr, q_mask, q.d)
    k = view_keys(k, pages, b, h)
    v = view_keys(v, pages, b, h)

    softmax = Softmax(
        m_i=tl.full([TILE.ROWS], -1e30, tl.float32),  # finite: a row without a key makes no NaN
        l_i=tl.full([TILE.ROWS], 0.0, tl.float32),
        acc=tl.full([TILE.ROWS, TILE.BLOCK_D], 0.0, tl.float32),
    )
    CHUNKS: tl.constexpr = (SHAPE.BLOCK_SIZE + TILE.BLOCK_N - 1) // TILE.BLOCK_N
    for begin in range(0, slots if MORE else 1, SLOTS):
        slot = split + (begin + tl.arange(0, SLOTS)) * splits
        blocks, places, end = _list_slots(
            selected_ptr, selected.d, slot, W, position, table, SHAPE, SLOTS
        )
        for i in range(0, 1 if SINGLE else end * CHUNKS):
            block = _pick(blocks, i // CHUNKS, SLOTS)
            page = _pick(places, i // CHUNKS, SLOTS)
            first, seen = _see_keys(block, i % CHUNKS, row_start, position, S, SHAPE, TILE)
            k_row, v_row = _point_at_keys(
                k, v, first, page, row_start, position, table, SHAPE, TILE
            )
            softmax = add_seen_keys(
                softmax,
                rows,
                k_row,
                v_row,
                k.d,
                seen,
                qk_scale_log2,
                SHAPE.D,
                TILE.BLOCK_D,
                TILE.FP32,
                TOGETHER=SINGLE and OVERLAP,
            )

    at = (head.to(tl.int64) * n + token) * splits + split
    part = parts_ptr + at * (TILE.ROWS * (TILE.BLOCK_D + 2)) + group * (TILE.BLOCK_D + 2)
    tl.store(part[:, None] + d[None, :], softmax.acc)
    tl.store(part + TILE.BLOCK_D, softmax.m_i)
    tl.store(part + TILE.BLOCK_D + 1, softmax.l_i)
