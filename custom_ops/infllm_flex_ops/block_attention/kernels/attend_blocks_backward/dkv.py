"""The gradients of keys and values: a block walks the tiles that listed it, in order.

A block that many tiles listed, as all list the first, is split among several programs: each sums
the gradients of ``split_size`` tiles into a slot of its own, and ``reduce_kernel`` adds the slots
in order. Other blocks walk the sequence range by range. No sum is atomic, so the bits repeat.

Where a tile holds many tokens, a block takes instead those that selected it, as tiles of one token.
"""

import triton
import triton.language as tl

from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.dkv_args import (
    BlockKeys,
    BlockTiles,
    Queries,
)
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.dkv_by_tile import add_tiles
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.dkv_by_token import add_tokens
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.ranges import (
    Problem,
    Ranges,
    find_pairs,
    finish,
    pass_on,
    store_sums,
    take_task,
)
from infllm_flex_ops.triton_common.constants import LOG2E
from infllm_flex_ops.triton_common.tensor_args import RowTensor, View


@triton.jit
def _group_view(x, b, h, SHAPE: tl.constexpr):
    """View the heads of ``x`` that share a KV head."""
    return View(x.ptr + b * x.b + h * SHAPE.G * x.h, x.b, x.h, x.s, x.d)


@triton.jit
def _load_keys(k, v, b, h, key, valid, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """Load the keys of a block and their values."""
    d = tl.arange(0, TILE.BLOCK_D)
    mask = valid[:, None] & (d < SHAPE.D)[None, :]
    k_row = k.ptr + b * k.b + h * k.h + key.to(tl.int64)[:, None] * k.s
    v_row = v.ptr + b * v.b + h * v.h + key.to(tl.int64)[:, None] * v.s
    k_loaded = mask  # unused in float32
    v_loaded = mask
    if not TILE.FP32:
        k_loaded = tl.load(k_row + d[None, :] * k.d, mask=mask, other=0.0)
        v_loaded = tl.load(v_row + d[None, :] * v.d, mask=mask, other=0.0)
    return BlockKeys(
        k=RowTensor(k_loaded, k_row, valid[:, None], k.d),
        v=RowTensor(v_loaded, v_row, valid[:, None], v.d),
        position=key,
    )


@triton.jit
def _count_rows(num_tiles, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """Count the rows of a head for which the dq kernel keeps numbers, without boxes."""
    rows = num_tiles * (TILE.PARTS * TILE.ROWS)
    if TILE.GATHERED:
        rows = tl.cdiv(num_tiles, TILE.GATHERED) * (TILE.GATHERED * SHAPE.G)
    return rows


@triton.jit
def _store_gradients(grads, first, key, valid, dk, dv, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """Write the gradients of keys; ``first`` is the head's first among those of all heads."""
    d = tl.arange(0, TILE.BLOCK_D)
    mask = valid[:, None] & (d < SHAPE.D)[None, :]
    out = ((first + key)[:, None]) * SHAPE.D + d[None, :]
    tl.store(grads.dk + out, dk, mask=mask)
    tl.store(grads.dv + out, dv, mask=mask)


_VARYING = ["Sq", "Skv", "num_tiles", "max_splits", "split_size"]


@triton.jit(
    do_not_specialize=[*_VARYING, "first_tiles", "range_tiles", "heads_at_once", "sum_heads"]
)
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
    max_splits,
    split_size,
    first_tiles,
    range_tiles,
    heads_at_once,
    sum_heads,
    scale,
    Hkv,
    heads,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Add some tiles to ``dk`` and ``dv`` of some keys of a block.

    A program takes a split of a block, into a slot of ``partial``, or a range of tiles of the whole
    sequence, to whose sums it adds; the last range writes the gradients.
    """
    grad_out, q, k, v, _, _ = inputs
    BLOCK_SIZE: tl.constexpr = SHAPE.BLOCK_SIZE
    TOKENS: tl.constexpr = SHAPE.TILE_TOKENS
    CHUNKS: tl.constexpr = (BLOCK_SIZE + TILE.BLOCK_N - 1) // TILE.BLOCK_N
    offset, num_blocks = Skv - Sq, tl.cdiv(Skv, BLOCK_SIZE)
    first_blocks = tl.minimum(num_blocks, tl.cdiv(offset + first_tiles * TOKENS, BLOCK_SIZE))
    first_blocks = tl.where(first_tiles > 0, first_blocks, 0)
    others = tl.cdiv(num_tiles - first_tiles, range_tiles)
    ranges = Ranges(first_tiles, range_tiles, others, first_blocks, heads_at_once, sum_heads)
    problem = Problem(heads, num_tiles, num_blocks, max_splits, split_size)
    task = take_task(grads.flags, ranges, problem, CHUNKS, TILE.IN_RANGES)
    head = task.head.to(tl.int64)
    b, h = (task.head // Hkv).to(tl.int64), (task.head % Hkv).to(tl.int64)
    block, begin, skipped, count, exists = find_pairs(task, tiles, splits, problem)
    own_tile = tl.maximum(block * BLOCK_SIZE - offset, 0) // TOKENS  # the first that may list it
    if exists & ((own_tile < task.end_tile) | (task.end_tile >= num_tiles)):
        inner = task.chunk * TILE.BLOCK_N + tl.arange(0, TILE.BLOCK_N)
        key = block * BLOCK_SIZE + inner
        valid = (inner < BLOCK_SIZE) & (key < Skv)
        keys = _load_keys(k, v, b, h, key, valid, SHAPE, TILE)
        if not TILE.USE_TMA:
            rows = _count_rows(num_tiles, SHAPE, TILE)
            row_lse += head * rows
            row_delta += head * rows
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
            offset=offset,
            qk_scale_log2=scale * LOG2E,
        )
        dk = tl.full([TILE.BLOCK_N, TILE.BLOCK_D], 0.0, tl.float32)
        dv = tl.full([TILE.BLOCK_N, TILE.BLOCK_D], 0.0, tl.float32)
        # At most EDGES tiles hold the block's own tokens. All later tiles need no causal test.
        EDGES: tl.constexpr = (BLOCK_SIZE + TOKENS - 2) // TOKENS + 1
        num_edges = tl.minimum(tl.maximum(EDGES - skipped, 0), count)
        for LATER in tl.static_range(2):
            block_tiles = BlockTiles(
                tile=tiles.tile + begin,
                membership=None if TILE.GATHERED else tiles.membership + begin,
                begin=num_edges if LATER else 0,
                end=count if LATER else num_edges,
            )
            if TILE.GATHERED:
                dk, dv = add_tokens(dk, dv, keys, queries, block_tiles, SHAPE, TILE, not LATER)
            else:
                dk, dv = add_tiles(
                    dk, dv, keys, queries, block_tiles, SHAPE, TILE, INDEX, not LATER
                )
        if task.number < 0:
            store_sums(grads.partial, task.split, inner, dk * scale, dv, SHAPE, TILE)
        else:
            is_last = True
            if TILE.IN_RANGES:
                dk, dv, is_last = pass_on(
                    dk, dv, grads, task, block, own_tile, inner, ranges, problem, SHAPE, TILE
                )
            if is_last:
                _store_gradients(grads, head * Skv, key, valid, dk * scale, dv, SHAPE, TILE)
    if TILE.IN_RANGES:
        finish(grads.flags, task, own_tile, ranges, problem)
