"""The gradient of the queries: a tile's rows walk its list again, as in the forward pass."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from infllm_flex_ops.block_attention.kernels.tile_args import (
    KeyValues,
    locate_rows,
    open_list,
    read_step,
)
from infllm_flex_ops.triton_common.constants import LOG2E
from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32
from infllm_flex_ops.triton_common.tensor_args import RowTensor, View


class RowLayout(NamedTuple):
    """Where ``row_lse`` and ``row_delta``, ``[B * Hkv, num_tiles, TILE_ROWS]``, keep a tile's rows.

    Attributes:
        TILE_ROWS: Rows kept per tile.
        BOX_TOKENS: Tokens of a box, whose rows stand head after head; 0: the tile's own order.
        BOX_ROWS: Rows of a box.
    """

    TILE_ROWS: int
    BOX_TOKENS: int
    BOX_ROWS: int


class _QueryRows(NamedTuple):
    """The rows of a tile, in a kernel.

    Attributes:
        q: Queries.
        do: Gradient of their output.
        lse: Log-sum-exp in base 2.
        delta: Dot product of the output and its gradient.
        token: Token within the tile.
        position: Position of the token among the keys.
        qk_scale_log2: Factor on the dot products, times log2 e.
    """

    q: Any
    do: Any
    lse: Any
    delta: Any
    token: Any
    position: Any
    qk_scale_log2: Any


@triton.jit
def _dq_inner(
    dq, rows, kv, tile_list, Skv, SHAPE: tl.constexpr, TILE: tl.constexpr, EDGE: tl.constexpr
):
    """Add the keys of a list's past blocks, or of its last ones, to the gradient of the rows."""
    CHUNKS: tl.constexpr = (SHAPE.BLOCK_SIZE + TILE.BLOCK_N - 1) // TILE.BLOCK_N
    CHECK: tl.constexpr = EDGE or SHAPE.BLOCK_SIZE % TILE.BLOCK_N != 0
    D: tl.constexpr = SHAPE.D
    q, do, k, v = rows.q, rows.do, kv.k, kv.v
    d = tl.arange(0, TILE.BLOCK_D)
    begin = tile_list.num_past if EDGE else 0
    end = tile_list.num if EDGE else tile_list.num_past
    for i in tl.range(begin * CHUNKS, end * CHUNKS):
        step = read_step(tile_list, i, rows.token, Skv, SHAPE, TILE, EDGE)
        valid = step.valid
        key = step.index.to(tl.int64)
        k_row = k.ptr + key[:, None] * k.s + d[None, :] * k.d
        v_row = v.ptr + key[:, None] * v.s + d[None, :] * v.d
        if TILE.USE_TMA:
            box = kv.k_desc.load([kv.b, kv.h, step.first, 0])
            keys = box.reshape(TILE.BLOCK_N, TILE.BLOCK_D)
        elif CHECK or D < TILE.BLOCK_D:
            key_mask = valid[:, None] & (d < D)[None, :]
            keys = tl.load(k_row, mask=key_mask, other=0.0)
        else:
            keys = tl.load(k_row)
        if TILE.FP32:
            k_columns = RowTensor(None, k.ptr + key[None, :] * k.s, valid[None, :], k.d)
            v_columns = RowTensor(None, v.ptr + key[None, :] * v.s, valid[None, :], v.d)
            logits = dot_fp32(q, k_columns, D, TILE.BLOCK_D)
            dweights = dot_fp32(do, v_columns, D, TILE.BLOCK_D)
        else:
            if TILE.USE_TMA:
                box = kv.v_desc.load([kv.b, kv.h, step.first, 0])
                v_values = box.reshape(TILE.BLOCK_N, TILE.BLOCK_D)
            elif CHECK or D < TILE.BLOCK_D:
                v_values = tl.load(v_row, mask=key_mask, other=0.0)
            else:
                v_values = tl.load(v_row)
            logits = tl.dot(q.loaded, tl.trans(keys))
            dweights = tl.dot(do.loaded, tl.trans(v_values))
        logits = logits * rows.qk_scale_log2
        weights = tl.exp2(logits - tl.where(step.member, rows.lse, float("inf"))[:, None])
        if EDGE:
            causal = valid[None, :] & (step.index[None, :] <= rows.position[:, None])
            weights = tl.where(causal, weights, 0.0)
        elif CHECK:
            weights = tl.where(valid[None, :], weights, 0.0)
        dlogits = weights * (dweights - rows.delta[:, None])
        dq = tl.dot(dlogits.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["Sq", "Skv", "num_tiles"])
def dq_kernel(
    inputs,
    k_desc,
    v_desc,
    lists,
    row_lse,
    row_delta,
    dq_ptr,
    Sq,
    Skv,
    num_tiles,
    scale,
    Hkv,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    ROW_LAYOUT: tl.constexpr,
):
    """Fill ``dq``, laid out as ``out``, for some rows of a tile; keep what dk and dv need of them.

    ``row_lse`` takes their log-sum-exp in base 2, ``row_delta`` the dot product of the output and
    its gradient, both where ``RowLayout`` says.
    """
    grad_out, q, k, v, out, lse_ptr = inputs
    part = tl.program_id(0) % TILE.PARTS
    tile = tl.program_id(0) // TILE.PARTS % num_tiles
    head = (tl.program_id(0) // TILE.PARTS // num_tiles).to(tl.int64)
    b, h = head // Hkv, head % Hkv
    rows = locate_rows(part, tile, h, Sq, Skv, SHAPE, TILE)
    exists, q_head, s = rows.exists, rows.q_head, rows.s
    d = tl.arange(0, TILE.BLOCK_D)
    mask = exists[:, None] & (d < SHAPE.D)[None, :]
    q_ptr = q.ptr + (b * q.b + q_head * q.h + s.to(tl.int64) * q.s)[:, None]
    k = View(k.ptr + b * k.b + h * k.h, k.b, k.h, k.s, k.d)
    v = View(v.ptr + b * v.b + h * v.h, v.b, v.h, v.s, v.d)
    lse_row = (b * Hkv * SHAPE.G + q_head) * Sq + s
    do_offset = b * grad_out.b + q_head * grad_out.h + s.to(tl.int64) * grad_out.s
    do_ptr = grad_out.ptr + do_offset[:, None]
    out_row = (b * out.b + q_head * out.h + s.to(tl.int64) * out.s)[:, None]
    do = tl.load(do_ptr + d[None, :] * grad_out.d, mask=mask, other=0.0)
    o = tl.load(out.ptr + out_row + d[None, :] * out.d, mask=mask, other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    lse = tl.load(lse_ptr + lse_row, mask=exists, other=0.0) * LOG2E
    place = rows.row
    if ROW_LAYOUT.BOX_TOKENS > 0:
        BOX_TOKENS: tl.constexpr = ROW_LAYOUT.BOX_TOKENS
        box = rows.token // BOX_TOKENS * ROW_LAYOUT.BOX_ROWS
        place = box + rows.row % SHAPE.G * BOX_TOKENS + rows.token % BOX_TOKENS
    place += (head * num_tiles + tile) * ROW_LAYOUT.TILE_ROWS
    tl.store(row_lse + place, lse, mask=exists)
    tl.store(row_delta + place, delta, mask=exists)
    loaded = do  # unused in float32
    if not TILE.FP32:
        loaded = tl.load(q_ptr + d[None, :] * q.d, mask=mask, other=0.0)

    dq = tl.full([TILE.ROWS, TILE.BLOCK_D], 0.0, tl.float32)
    query_rows = _QueryRows(
        q=RowTensor(loaded, q_ptr, exists[:, None], q.d),
        do=RowTensor(do, do_ptr, exists[:, None], grad_out.d),
        lse=lse,
        delta=delta,
        token=rows.token,
        position=rows.position,
        qk_scale_log2=scale * LOG2E,
    )
    kv = KeyValues(k, v, k_desc, v_desc, b.to(tl.int32), h.to(tl.int32), None)
    tile_list = open_list(lists, head * num_tiles + tile, Skv, SHAPE)
    for EDGE in tl.static_range(2):
        dq = _dq_inner(dq, query_rows, kv, tile_list, Skv, SHAPE, TILE, EDGE)
    tl.store(dq_ptr + out_row + d[None, :] * out.d, dq * scale, mask=mask)
