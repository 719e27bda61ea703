"""Attention of tiles to their lists: a tile's rows walk the union of their tokens' blocks.

One membership bit per token says whether the token selected a block. For a row that did not,
+inf is subtracted from its logits, so exp2 gives 0: one ``where`` per row instead of one per key.
Only the last blocks of a list can reach beyond the tile's first token; only they are tested key by
key.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from infllm_flex_ops.block_attention.kernels.tile_args import (
    KeyValues,
    locate_rows,
    open_list,
    read_step,
)
from infllm_flex_ops.triton_common.constants import LN2
from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32
from infllm_flex_ops.triton_common.pages import locate_keys
from infllm_flex_ops.triton_common.tensor_args import RowTensor, Softmax, View


class QueryRows(NamedTuple):
    """The rows of a tile, in a kernel.

    Attributes:
        q: Queries.
        token: Token within the tile.
        position: Position of the token among the keys.
        qk_scale_log2: Factor on the dot products, times log2 e.
    """

    q: Any
    token: Any
    position: Any
    qk_scale_log2: Any


@triton.jit
def attend_to_list(
    softmax, rows, kv, tile_list, Skv, SHAPE: tl.constexpr, TILE: tl.constexpr, EDGE: tl.constexpr
):
    """Add the keys of a list's past blocks, or of its last ones, to the softmax of the rows."""
    CHUNKS: tl.constexpr = (SHAPE.BLOCK_SIZE + TILE.BLOCK_N - 1) // TILE.BLOCK_N
    CHECK: tl.constexpr = EDGE or SHAPE.BLOCK_SIZE % TILE.BLOCK_N != 0
    acc, m_i, l_i = softmax
    q, k, v, qk_scale_log2 = rows.q, kv.k, kv.v, rows.qk_scale_log2
    d = tl.arange(0, TILE.BLOCK_D)
    begin = tile_list.num_past if EDGE else 0
    end = tile_list.num if EDGE else tile_list.num_past
    for i in tl.range(begin * CHUNKS, end * CHUNKS):
        keys = read_step(tile_list, i, rows.token, Skv, SHAPE, TILE, EDGE)
        valid = keys.valid
        if SHAPE.PAGE == 0:
            box_b, box_s = kv.b, keys.first
            k_row = k.ptr + keys.index.to(tl.int64)[None, :] * k.s
            v_row = v.ptr + keys.index.to(tl.int64)[:, None] * v.s + d[None, :] * v.d
        else:
            page, entry = locate_keys(
                keys.first,
                keys.index,
                Skv - 1,
                kv.table,
                SHAPE.PAGE,
                SHAPE.BLOCK_SIZE,
            )
            if TILE.USE_TMA:  # blocks lie in one page
                box_b, box_s = page.to(tl.int32), keys.first % SHAPE.PAGE
            k_row = k.ptr + (page * k.b + entry * k.s)[None, :]
            v_row = v.ptr + (page * v.b + entry * v.s)[:, None] + d[None, :] * v.d
        if TILE.FP32:
            columns = RowTensor(None, k_row, valid[None, :], k.d)
            logits = dot_fp32(q, columns, SHAPE.D, TILE.BLOCK_D)
        elif TILE.USE_TMA:
            box = kv.k_desc.load([box_b, kv.h, box_s, 0]).reshape(TILE.BLOCK_N, TILE.BLOCK_D)
            logits = tl.dot(q.loaded, tl.trans(box))
        elif CHECK or SHAPE.D < TILE.BLOCK_D:
            k_mask = valid[None, :] & (d < SHAPE.D)[:, None]
            logits = tl.dot(q.loaded, tl.load(k_row + d[:, None] * k.d, mask=k_mask, other=0.0))
        else:
            logits = tl.dot(q.loaded, tl.load(k_row + d[:, None] * k.d))
        if EDGE:
            seen = valid[None, :] & (keys.index[None, :] <= rows.position[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        elif CHECK:
            logits = tl.where(valid[None, :], logits, float("-inf"))
        row_max = tl.where(keys.member, tl.max(logits, 1) * qk_scale_log2, float("-inf"))
        m_new = tl.maximum(m_i, row_max)
        m_safe = tl.where(keys.member, m_new, float("inf"))
        weights = tl.exp2(logits * qk_scale_log2 - m_safe[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(weights, 1)
        m_i = m_new
        if TILE.USE_TMA:
            box = kv.v_desc.load([box_b, kv.h, box_s, 0])
            values = box.reshape(TILE.BLOCK_N, TILE.BLOCK_D)
            if EDGE and SHAPE.PAGE > 0:  # behind the last key a page may hold NaN
                values = tl.where(valid[:, None], values, 0.0)
        elif CHECK or SHAPE.D < TILE.BLOCK_D:
            v_mask = valid[:, None] & (d < SHAPE.D)[None, :]
            values = tl.load(v_row, mask=v_mask, other=0.0)
        else:
            values = tl.load(v_row)
        weights = weights.to(values.dtype)
        acc = tl.dot(weights, values, acc * alpha[:, None], input_precision="ieee")
    return Softmax(acc, m_i, l_i)


@triton.jit(do_not_specialize=["Sq", "Skv", "num_tiles"])
def attend_kernel(
    q,
    k,
    v,
    lists,
    out,
    lse_ptr,
    Sq,
    Skv,
    num_tiles,
    qk_scale_log2,
    Hkv,
    k_desc,
    v_desc,
    table,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attend with some rows of one tile, of one KV head.

    ``q``, ``k``, ``v`` and ``out`` are views, ``k_desc`` and ``v_desc`` tensor descriptors or None,
    ``lists`` the tiles' ``Lists``. ``lse_ptr [B, Hq, Sq]`` takes the natural log-sum-exp. With a
    ``table`` of pages, int32, there is one row, and keys and values are pages.
    """
    part = tl.program_id(0) % TILE.PARTS
    tile = tl.program_id(0) // TILE.PARTS % num_tiles
    head = (tl.program_id(0) // TILE.PARTS // num_tiles).to(tl.int64)
    b, h = head // Hkv, head % Hkv
    rows = locate_rows(part, tile, h, Sq, Skv, SHAPE, TILE)
    d = tl.arange(0, TILE.BLOCK_D)
    q_ptr = q.ptr + (b * q.b + rows.q_head * q.h + rows.s.to(tl.int64) * q.s)[:, None]
    q_mask = rows.exists[:, None]
    d_mask = (d < SHAPE.D)[None, :]
    loaded = q_mask  # unused in float32
    if not TILE.FP32:
        loaded = tl.load(q_ptr + d[None, :] * q.d, mask=q_mask & d_mask, other=0.0)
    k = View(k.ptr + b * k.b + h * k.h, k.b, k.h, k.s, k.d)
    v = View(v.ptr + b * v.b + h * v.h, v.b, v.h, v.s, v.d)
    kv = KeyValues(k, v, k_desc, v_desc, b.to(tl.int32), h.to(tl.int32), table)

    softmax = Softmax(
        m_i=tl.full([TILE.ROWS], -1e30, tl.float32),  # finite: rows without a key make no NaN
        l_i=tl.full([TILE.ROWS], 0.0, tl.float32),
        acc=tl.full([TILE.ROWS, TILE.BLOCK_D], 0.0, tl.float32),
    )
    tile_list = open_list(lists, head * num_tiles + tile, Skv, SHAPE)
    q_rows = RowTensor(loaded, q_ptr, q_mask, q.d)
    query_rows = QueryRows(q_rows, rows.token, rows.position, qk_scale_log2)
    for EDGE in tl.static_range(2):
        softmax = attend_to_list(softmax, query_rows, kv, tile_list, Skv, SHAPE, TILE, EDGE)

    lse_row = (b * Hkv * SHAPE.G + rows.q_head) * Sq + rows.s
    out_row = b * out.b + rows.q_head * out.h + rows.s.to(tl.int64) * out.s
    l_safe = tl.where(softmax.l_i == 0.0, 1.0, softmax.l_i)
    lse = (softmax.m_i + tl.log2(l_safe)) * LN2
    lse = tl.where(softmax.l_i == 0.0, float("-inf"), lse)
    tl.store(lse_ptr + lse_row, lse, mask=rows.exists)
    values = softmax.acc / l_safe[:, None]
    out_ptr = out.ptr + out_row[:, None] + d[None, :] * out.d
    tl.store(out_ptr, values, mask=q_mask & d_mask)
