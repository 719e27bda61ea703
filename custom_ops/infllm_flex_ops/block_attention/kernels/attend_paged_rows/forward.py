"""Dense attention of ragged rows: a tile's rows walk all blocks up to the tile's last token."""

import triton
import triton.language as tl

from infllm_flex_ops.block_attention.kernels.attend_blocks.forward import QueryRows, attend_to_list
from infllm_flex_ops.block_attention.kernels.exact_reads import add_seen_keys
from infllm_flex_ops.block_attention.kernels.tile_args import KeyValues, TileList, locate_rows
from infllm_flex_ops.triton_common.pages import RowPages, token_offset, view_keys, view_queries
from infllm_flex_ops.triton_common.tensor_args import RowTensor, Softmax


@triton.jit
def _count_row(pages, seq_lens_ptr, b, min_queries, max_length):
    """Queries and tokens of a row; no queries if the row is left out."""
    Sq = tl.load(pages.query_start + b + 1) - tl.load(pages.query_start + b)
    Skv = tl.load(seq_lens_ptr + b)
    return tl.where((Sq < min_queries) | (Skv > max_length), 0, Sq), Skv


@triton.jit(do_not_specialize=["first_row", "min_queries", "max_length"])
def attend_rows_kernel(
    q,
    k,
    v,
    out,
    pages,
    seq_lens_ptr,
    has_nonfinite_ptr,
    first_row,
    min_queries,
    max_length,
    qk_scale_log2,
    Hkv,
    k_desc,
    v_desc,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attend with some rows of one tile, of one KV head of one row of the batch.

    Set ``has_nonfinite [rows, Hkv]`` to 1 where a result is NaN or inf.
    """
    part = tl.program_id(0) % TILE.PARTS
    tile = tl.program_id(0) // TILE.PARTS
    head = tl.program_id(1)
    b, h = (first_row + head // Hkv).to(tl.int64), head % Hkv
    Sq, Skv = _count_row(pages, seq_lens_ptr, b, min_queries, max_length)
    if tile * SHAPE.TILE_TOKENS >= Sq:
        return
    rows = locate_rows(part, tile, h, Sq, Skv, SHAPE, TILE)
    d = tl.arange(0, TILE.BLOCK_D)
    q = view_queries(q, pages, b)
    out = view_queries(out, pages, b)
    q_ptr = q.ptr + (rows.q_head.to(tl.int64) * q.h + rows.s.to(tl.int64) * q.s)[:, None]
    mask = rows.exists[:, None] & (d < SHAPE.D)[None, :]
    loaded = mask  # unused in float32
    if not TILE.FP32:
        loaded = tl.load(q_ptr + d[None, :] * q.d, mask=mask, other=0.0)
    k = view_keys(k, pages, b, h.to(tl.int64))
    v = view_keys(v, pages, b, h.to(tl.int64))
    kv = KeyValues(k, v, k_desc, v_desc, 0, h, pages.table + b * pages.row)

    softmax = Softmax(
        m_i=tl.full([TILE.ROWS], -1e30, tl.float32),  # finite: rows that do not exist make no NaN
        l_i=tl.full([TILE.ROWS], 0.0, tl.float32),
        acc=tl.full([TILE.ROWS, TILE.BLOCK_D], 0.0, tl.float32),
    )
    first = Skv - Sq + tile * SHAPE.TILE_TOKENS
    last = tl.minimum(first + SHAPE.TILE_TOKENS, Skv) - 1
    num = last // SHAPE.BLOCK_SIZE + 1
    tile_list = TileList(None, None, num, (first + 1) // SHAPE.BLOCK_SIZE, 0)
    q_rows = RowTensor(loaded, q_ptr, rows.exists[:, None], q.d)
    query_rows = QueryRows(q_rows, rows.token, rows.position, qk_scale_log2)
    for EDGE in tl.static_range(2):
        softmax = attend_to_list(softmax, query_rows, kv, tile_list, Skv, SHAPE, TILE, EDGE)

    averaged = softmax.acc / softmax.l_i[:, None]
    zero = tl.sum(averaged * 0.0, 1)  # NaN where an element is not finite
    flag = has_nonfinite_ptr + head + tl.full([TILE.ROWS], 0, tl.int32)
    tl.store(flag, 1, mask=rows.exists & (zero != 0.0))
    out_ptr = out.ptr + (rows.q_head.to(tl.int64) * out.h + rows.s.to(tl.int64) * out.s)[:, None]
    tl.store(out_ptr + d[None, :] * out.d, averaged, mask=mask)


@triton.jit(do_not_specialize=["first_row", "min_queries", "max_length"])
def redo_nonfinite_rows_kernel(
    q,
    k,
    v,
    out,
    pages,
    seq_lens_ptr,
    has_nonfinite_ptr,
    first_row,
    min_queries,
    max_length,
    qk_scale_log2,
    Hkv,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attend again where a row's head ``has_nonfinite``, one token at a time.

    A tile multiplies the values of later tokens by zero, and zero times NaN is NaN. Here each token
    reads only what it sees. The programs of a row take its tokens round-robin.
    """
    head = tl.program_id(1)
    b, h = (first_row + head // Hkv).to(tl.int64), (head % Hkv).to(tl.int64)
    Sq, Skv = _count_row(pages, seq_lens_ptr, b, min_queries, max_length)
    if tl.load(has_nonfinite_ptr + head) == 0:
        Sq = 0
    n = tl.arange(0, TILE.BLOCK_N)
    d = tl.arange(0, TILE.BLOCK_D)
    row = tl.arange(0, TILE.ROWS)
    q_head = h * SHAPE.G + row
    exists = (row < SHAPE.G)[:, None]
    mask = exists & (d < SHAPE.D)[None, :]
    q = view_queries(q, pages, b)
    out = view_queries(out, pages, b)
    k = view_keys(k, pages, b, h)
    v = view_keys(v, pages, b, h)
    table = pages.table + b * pages.row
    step = tl.num_programs(0)
    for i in tl.range(0, (Sq - tl.program_id(0) + step - 1) // step):
        s = tl.program_id(0) + i * step
        position = Skv - Sq + s
        q_row = (q.ptr + q_head * q.h + s.to(tl.int64) * q.s)[:, None]
        loaded = tl.load(q_row + d[None, :] * q.d, mask=mask, other=0.0)
        softmax = Softmax(
            m_i=tl.full([TILE.ROWS], -1e30, tl.float32),
            l_i=tl.full([TILE.ROWS], 0.0, tl.float32),
            acc=tl.full([TILE.ROWS, TILE.BLOCK_D], 0.0, tl.float32),
        )
        for begin in tl.range(0, position + 1, TILE.BLOCK_N):
            key = begin + n
            seen = key <= position
            row_pages = RowPages(table, seen)
            k_row = k.ptr + token_offset(k, key, row_pages, SHAPE.PAGE)[None, :]
            v_row = v.ptr + token_offset(v, key, row_pages, SHAPE.PAGE)[:, None]
            softmax = add_seen_keys(
                softmax,
                RowTensor(loaded, q_row, exists, q.d),
                k_row,
                v_row + d[None, :] * v.d,
                k.d,
                seen,
                qk_scale_log2,
                SHAPE.D,
                TILE.BLOCK_D,
                TILE.FP32,
            )
        out_row = (out.ptr + q_head * out.h + s.to(tl.int64) * out.s)[:, None]
        averaged = softmax.acc / softmax.l_i[:, None]
        tl.store(out_row + d[None, :] * out.d, averaged, mask=mask)
