"""Gradients of a block's keys and values from whole tiles, masked by their membership bits."""

import triton
import triton.language as tl

from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32
from infllm_flex_ops.triton_common.tensor_args import RowTensor


@triton.jit
def add_tiles(
    dk,
    dv,
    keys,
    queries,
    tiles,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    INDEX: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add the rows of some of a block's tiles to the gradients of its keys and values."""
    PARTS: tl.constexpr = TILE.PARTS
    HEADS: tl.constexpr = triton.next_power_of_2(SHAPE.G)
    BOX_TOKENS: tl.constexpr = TILE.ROWS // HEADS if TILE.USE_TMA else TILE.ROWS
    q, do, k, v = queries.q, queries.do, keys.k, keys.v
    d = tl.arange(0, TILE.BLOCK_D)
    lane = tl.arange(0, TILE.ROWS)
    for i in tl.range(tiles.begin * PARTS, tiles.end * PARTS):
        # Clamp, so that a corrupt list cannot read out of bounds.
        tile = tl.load(tiles.tile + i // PARTS)
        tile = tl.minimum(tl.maximum(tile, 0), queries.num_tiles - 1)
        membership = tl.load(tiles.membership + i // PARTS)
        if TILE.USE_TMA:  # a box holds the rows head after head, then rows of zeros
            group = lane // BOX_TOKENS
            token = i % PARTS * BOX_TOKENS + lane % BOX_TOKENS
        else:
            group = (i % PARTS * TILE.ROWS + lane) % SHAPE.G
            token = (i % PARTS * TILE.ROWS + lane) // SHAPE.G
        member = ((membership >> token) & 1) != 0
        # Offsets within a tile are the same for all tiles, and stay in registers.
        q_tile = q.ptr + tile.to(tl.int64) * SHAPE.TILE_TOKENS * q.s
        do_tile = do.ptr + tile.to(tl.int64) * SHAPE.TILE_TOKENS * do.s
        q_row = q_tile + group.to(INDEX) * q.h + token * q.s
        do_row = do_tile + group.to(INDEX) * do.h + token * do.s
        if TILE.USE_TMA:
            at = [queries.b, queries.h, 0, tile * SHAPE.TILE_TOKENS + i % PARTS * BOX_TOKENS, 0]
            q_rows = queries.q_desc.load(at).reshape(TILE.ROWS, TILE.BLOCK_D)
            do_rows = queries.do_desc.load(at).reshape(TILE.ROWS, TILE.BLOCK_D)
        else:
            s = tile * SHAPE.TILE_TOKENS + token
            exists = (token < SHAPE.TILE_TOKENS) & (s < queries.Sq)
            row_mask = exists[:, None] & (d < SHAPE.D)[None, :]
            q_rows = tl.load(q_row[:, None] + d[None, :] * q.d, mask=row_mask, other=0.0)
            do_rows = tl.load(do_row[:, None] + d[None, :] * do.d, mask=row_mask, other=0.0)
        # Missing rows have lse = inf, so their weights are zero.
        if TILE.USE_TMA:
            line = (queries.first_tile + tile) * PARTS + i % PARTS
            lse = queries.row_lse.load([line, 0]).reshape(TILE.ROWS)
            delta = queries.row_delta.load([line, 0]).reshape(TILE.ROWS)
        else:
            row = tile.to(tl.int64) * (PARTS * TILE.ROWS) + i % PARTS * TILE.ROWS + lane
            lse = tl.load(queries.row_lse + row)
            delta = tl.load(queries.row_delta + row)
        if TILE.FP32:
            q_columns = RowTensor(None, q_row[None, :], exists[None, :], q.d)
            logits = dot_fp32(k, q_columns, SHAPE.D, TILE.BLOCK_D)
        else:
            logits = tl.dot(k.loaded, tl.trans(q_rows))
        logits = logits * queries.qk_scale_log2
        weights = tl.exp2(logits - tl.where(member, lse, float("inf"))[None, :])
        if EDGE:
            ahead = keys.position - queries.offset - tile * SHAPE.TILE_TOKENS
            weights = tl.where(ahead[:, None] <= token[None, :], weights, 0.0)
        dv = tl.dot(weights.to(do_rows.dtype), do_rows, dv, input_precision="ieee")
        if TILE.FP32:
            do_columns = RowTensor(None, do_row[None, :], exists[None, :], do.d)
            dweights = dot_fp32(v, do_columns, SHAPE.D, TILE.BLOCK_D)
        else:
            dweights = tl.dot(v.loaded, tl.trans(do_rows))
        dlogits = weights * (dweights - delta[None, :])
        dk = tl.dot(dlogits.to(q_rows.dtype), q_rows, dk, input_precision="ieee")
    return dk, dv
