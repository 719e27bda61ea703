"""Tiles of a decode step: where their queries lie, and whether they select anything."""

import triton
import triton.language as tl

from infllm_flex_ops.triton_common.pages import is_missing


@triton.jit
def point_at_queries(q, b, h, tile, num, TILE: tl.constexpr):
    """Point at the queries of a tile's rows, head after head; a head has ``num`` of them.

    Returns:
        The query, counted in its head, of each row ``[HEADS * TOKENS]``; its pointer; whether it
        exists.
    """
    column = tl.arange(0, TILE.HEADS * TILE.TOKENS)
    group = column // TILE.TOKENS
    row = tile * TILE.TOKENS + column % TILE.TOKENS
    offset = b * q.b + (h * TILE.G + group) * q.h + row.to(tl.int64) * q.s
    return row, q.ptr + offset, (group < TILE.G) & (row < num)


@triton.jit
def selects_nothing(pages, tile, num, last, dense_len, RULE: tl.constexpr, TILE: tl.constexpr):
    """Whether a tile has nothing to select.

    Its row has too few queries, ``num``, or its last query, at ``last``, attends to all blocks.
    """
    is_full = (last + 1 < dense_len) | (last < RULE.num_selected * RULE.block_size)
    return is_missing(pages, tile * TILE.TOKENS, num) | is_full
