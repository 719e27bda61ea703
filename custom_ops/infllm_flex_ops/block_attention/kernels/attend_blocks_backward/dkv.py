"""The gradients of keys and values: a block walks the tiles that listed it, in order.

A block that many tiles listed, as all list the first, is split among several programs: each sums
the gradients of ``split_size`` tiles into a slot of its own, and ``reduce_kernel`` adds the slots
in order. There are no atomics, so the bits repeat.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from infllm_flex_ops.triton_common.constants import LOG2E
from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32
from infllm_flex_ops.triton_common.tensor_args import RowTensor, View


class KeyGradients(NamedTuple):
    """The gradients of keys and values.

    Attributes:
        dk: ``[B, Hkv, Skv, D]``, contiguous.
        dv: ``[B, Hkv, Skv, D]``, contiguous.
        partial: Sums of the splits, float32 ``[B * Hkv * max_splits, 2, block_size, D]``.
    """

    dk: Any
    dv: Any
    partial: Any


class Queries(NamedTuple):
    """The queries of one KV head's group and what the backward knows of them, in a kernel.

    Attributes:
        q: View of the group's queries.
        do: View of the gradient of their output.
        q_desc: Tensor descriptor of all queries, or None.
        do_desc: Tensor descriptor of the whole gradient, or None.
        row_lse: Log-sum-exp of the head's rows in base 2: pointer, or descriptor of all rows.
        row_delta: Dot products of output and gradient, likewise.
        first_tile: First tile of the head among those of all heads.
        num_tiles: Tiles of the head.
        b: Batch row.
        h: KV head.
        Sq: Queries of the sequence.
        offset: Position of the first query.
        qk_scale_log2: Factor on the dot products, times log2 e.
    """

    q: Any
    do: Any
    q_desc: Any
    do_desc: Any
    row_lse: Any
    row_delta: Any
    first_tile: Any
    num_tiles: Any
    b: Any
    h: Any
    Sq: Any
    offset: Any
    qk_scale_log2: Any


class BlockKeys(NamedTuple):
    """Keys of one block, in a kernel.

    Attributes:
        k: The keys.
        v: Their values.
        position: Their positions.
    """

    k: Any
    v: Any
    position: Any


class BlockTiles(NamedTuple):
    """Tiles that listed one block, in a kernel.

    Attributes:
        tile: Pointer to the block's first tile.
        membership: Pointer to its membership bits.
        begin: First tile to take.
        end: One past the last tile to take.
    """

    tile: Any
    membership: Any
    begin: Any
    end: Any


@triton.jit
def _schedule(tasks, heads, heads_at_once, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """Say which head, which part of a block's keys, and which of a head's tasks a program takes."""
    CHUNKS: tl.constexpr = (SHAPE.BLOCK_SIZE + TILE.BLOCK_N - 1) // TILE.BLOCK_N
    per_head = tasks * CHUNKS
    first_head = tl.program_id(0) // (heads_at_once * per_head) * heads_at_once
    of_these = tl.program_id(0) - first_head * per_head
    num_heads = tl.minimum(heads_at_once, heads - first_head)
    head = (first_head + of_these % num_heads).to(tl.int64)
    return head, of_these // num_heads % CHUNKS, of_these // num_heads // CHUNKS


@triton.jit
def _group_view(x, b, h, SHAPE: tl.constexpr):
    """View the heads of ``x`` that share a KV head."""
    return View(x.ptr + b * x.b + h * SHAPE.G * x.h, x.b, x.h, x.s, x.d)


@triton.jit
def _store_split(partial_ptr, split, inner, dk, dv, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """Write the gradients of a block's keys ``inner`` to the slot of a split."""
    d = tl.arange(0, TILE.BLOCK_D)
    at = (split * 2 * SHAPE.BLOCK_SIZE + inner)[:, None] * SHAPE.D + d[None, :]
    mask = (inner < SHAPE.BLOCK_SIZE)[:, None] & (d < SHAPE.D)[None, :]
    tl.store(partial_ptr + at, dk, mask=mask)
    tl.store(partial_ptr + at + SHAPE.BLOCK_SIZE * SHAPE.D, dv, mask=mask)


@triton.jit
def _dkv_inner(
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


_VARYING = ["Sq", "Skv", "num_tiles", "num_blocks", "max_splits", "split_size", "heads_at_once"]


@triton.jit(do_not_specialize=_VARYING)
def dkv_kernel(
    inputs,
    do_desc,
    q_desc,
    row_lse,
    row_delta,
    tiles,
    splits,
    grads,
    Sq,
    Skv,
    num_tiles,
    num_blocks,
    max_splits,
    split_size,
    scale,
    Hkv,
    heads,
    heads_at_once,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Fill ``dk`` and ``dv`` for some keys of a block, or a slot of ``partial`` for a split of it.

    Programs take ``heads_at_once`` heads at a time, so that the rows of their queries, which blocks
    walk at about the same time, stay in L2. Splits come first, as they take longest.
    """
    grad_out, q, k, v, _, _ = inputs
    head, chunk, task = _schedule(max_splits + num_blocks, heads, heads_at_once, SHAPE, TILE)
    b, h = head // Hkv, head % Hkv
    is_split = task < max_splits
    split = head * max_splits + tl.minimum(task, max_splits - 1)
    block = task - max_splits
    skipped = 0
    if is_split:
        block = tl.load(splits.block + split)
        skipped = tl.load(splits.number + split) * split_size
    if (block < num_blocks) & (block >= 0):
        begin = tl.load(tiles.begin + head * num_blocks + block) + skipped
        count = tl.load(tiles.length + head * num_blocks + block) - skipped
        has_splits = tl.load(splits.per_block + head * num_blocks + block) > 0
        if is_split:
            count = tl.minimum(count, split_size)
        if is_split | (has_splits == 0):
            inner = chunk * TILE.BLOCK_N + tl.arange(0, TILE.BLOCK_N)
            key = block * SHAPE.BLOCK_SIZE + inner
            valid = (inner < SHAPE.BLOCK_SIZE) & (key < Skv)
            d = tl.arange(0, TILE.BLOCK_D)
            key_mask = valid[:, None] & (d < SHAPE.D)[None, :]
            k_row = k.ptr + b * k.b + h * k.h + key.to(tl.int64)[:, None] * k.s
            v_row = v.ptr + b * v.b + h * v.h + key.to(tl.int64)[:, None] * v.s
            k_loaded = key_mask  # unused in float32
            v_loaded = key_mask
            if not TILE.FP32:
                k_loaded = tl.load(k_row + d[None, :] * k.d, mask=key_mask, other=0.0)
                v_loaded = tl.load(v_row + d[None, :] * v.d, mask=key_mask, other=0.0)
            if not TILE.USE_TMA:
                row_lse += head * num_tiles * (TILE.PARTS * TILE.ROWS)
                row_delta += head * num_tiles * (TILE.PARTS * TILE.ROWS)
            dk = tl.full([TILE.BLOCK_N, TILE.BLOCK_D], 0.0, tl.float32)
            dv = tl.full([TILE.BLOCK_N, TILE.BLOCK_D], 0.0, tl.float32)
            # At most EDGES tiles hold the block's own tokens. All later tiles need no causal test.
            TOKENS: tl.constexpr = SHAPE.TILE_TOKENS
            EDGES: tl.constexpr = (SHAPE.BLOCK_SIZE + TOKENS - 2) // TOKENS + 1
            num_edges = tl.minimum(tl.maximum(EDGES - skipped, 0), count)
            queries = Queries(
                q=_group_view(q, b, h, SHAPE),
                do=_group_view(grad_out, b, h, SHAPE),
                q_desc=q_desc,
                do_desc=do_desc,
                row_lse=row_lse,
                row_delta=row_delta,
                first_tile=head.to(tl.int32) * num_tiles,
                num_tiles=num_tiles,
                b=b.to(tl.int32),
                h=h.to(tl.int32),
                Sq=Sq,
                offset=Skv - Sq,
                qk_scale_log2=scale * LOG2E,
            )
            keys = BlockKeys(
                k=RowTensor(k_loaded, k_row, valid[:, None], k.d),
                v=RowTensor(v_loaded, v_row, valid[:, None], v.d),
                position=key,
            )
            for LATER in tl.static_range(2):
                block_tiles = BlockTiles(
                    tile=tiles.tile + begin,
                    membership=tiles.membership + begin,
                    begin=num_edges if LATER else 0,
                    end=count if LATER else num_edges,
                )
                dk, dv = _dkv_inner(
                    dk, dv, keys, queries, block_tiles, SHAPE, TILE, INDEX, not LATER
                )
            if is_split:
                _store_split(grads.partial, split, inner, dk * scale, dv, SHAPE, TILE)
            else:
                out = ((head * Skv + key)[:, None]) * SHAPE.D + d[None, :]
                tl.store(grads.dk + out, dk * scale, mask=key_mask)
                tl.store(grads.dv + out, dv, mask=key_mask)
