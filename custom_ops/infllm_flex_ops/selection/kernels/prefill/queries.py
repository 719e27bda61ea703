"""Load the queries of a tile."""

import triton
import triton.language as tl

from infllm_flex_ops.triton_common.tensor_args import RowTensor


@triton.jit
def load_queries(q, b, h, token, exists, TILE: tl.constexpr):
    """Load query rows ``[rows, D]`` of one KV head.

    Args:
        q: View of all queries.
        b: Batch row, int64.
        h: KV head, int64.
        token: Query of each row.
        exists: Whether each row's query exists.
        TILE: Sizes of the program.
    """
    head = tl.arange(0, TILE.HEADS * TILE.TOKENS) // TILE.TOKENS
    row = b * q.b + (h * TILE.G + head) * q.h + token.to(tl.int64) * q.s
    ptr = q.ptr + row[:, None]
    mask = ((head < TILE.G) & exists)[:, None]
    loaded = mask  # unused in float32
    if not TILE.FP32:
        d = tl.arange(0, TILE.BLOCK_D)
        loaded = tl.load(ptr + d[None, :] * q.d, mask=mask & (d < TILE.D)[None, :], other=0.0)
    return RowTensor(loaded, ptr, mask, q.d)


@triton.jit
def load_query_columns(q, b, h, token, exists, TILE: tl.constexpr):
    """Load query rows of one KV head as columns ``[D, HEADS * TOKENS]``, head after head.

    Args:
        q: View of all queries.
        b: Batch row, int64.
        h: KV head, int64.
        token: Query of each column.
        exists: Whether each column's query exists.
        TILE: Sizes of the program.
    """
    group = tl.arange(0, TILE.HEADS * TILE.TOKENS) // TILE.TOKENS
    row = b * q.b + (h * TILE.G + group) * q.h + token.to(tl.int64) * q.s
    ptr = q.ptr + row[None, :]
    mask = ((group < TILE.G) & exists)[None, :]
    loaded = mask  # unused in float32
    if not TILE.FP32:
        d = tl.arange(0, TILE.BLOCK_D)
        loaded = tl.load(ptr + d[:, None] * q.d, mask=mask & (d < TILE.D)[:, None], other=0.0)
    return RowTensor(loaded, ptr, mask, q.d)
