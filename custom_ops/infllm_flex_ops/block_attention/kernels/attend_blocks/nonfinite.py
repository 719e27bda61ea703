"""Attention where keys or values hold NaN or inf: slower, and each row reads only what it sees.

The fast kernel multiplies a tile's rows by all its keys, and zero times NaN is NaN. This kernel
repairs the result of the heads, and only those, that hold such keys or values.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from infllm_flex_ops.block_attention.kernels.exact_reads import add_seen_keys
from infllm_flex_ops.triton_common.constants import LN2
from infllm_flex_ops.triton_common.pages import RowPages, token_offset
from infllm_flex_ops.triton_common.tensor_args import RowTensor, Softmax


class ExactTile(NamedTuple):
    """Compile-time sizes of a program; ``ROWS`` is the group of heads, padded to a power of two."""

    ROWS: int
    BLOCK_N: int
    BLOCK_D: int
    FP32: bool


@triton.jit(do_not_specialize=["S"])
def find_nonfinite_kernel(
    k,
    v,
    has_nonfinite_ptr,
    table,
    S,
    Hkv,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Set ``has_nonfinite`` of a head to 1 if some of its keys or values are not finite."""
    chunks = tl.cdiv(S, BLOCK_S)
    head = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = head // Hkv, head % Hkv
    s = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    mask = (s < S)[:, None] & (d < D)[None, :]
    row = None
    if PAGE > 0:
        row = RowPages(table, (s < S)[:, None])
    k_row = k.ptr + b * k.b + h * k.h + token_offset(k, s[:, None], row, PAGE)
    v_row = v.ptr + b * v.b + h * v.h + token_offset(v, s[:, None], row, PAGE)
    keys = tl.load(k_row + d[None, :] * k.d, mask=mask, other=0.0).to(tl.float32)
    v_values = tl.load(v_row + d[None, :] * v.d, mask=mask, other=0.0).to(tl.float32)
    finite = (tl.abs(keys) < float("inf")) & (tl.abs(v_values) < float("inf"))
    if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
        tl.store(has_nonfinite_ptr + head, 1)


@triton.jit(do_not_specialize=["Sq", "Skv", "num_tiles"])
def attend_exact_reads_kernel(
    has_nonfinite_ptr,
    q,
    k,
    v,
    lists,
    out,
    lse_ptr,
    table,
    Sq,
    Skv,
    num_tiles,
    qk_scale_log2,
    Hkv,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attend again if the head ``has_nonfinite``, one token at a time.

    The programs of a head take its tokens round-robin.
    """
    BLOCK_SIZE: tl.constexpr = SHAPE.BLOCK_SIZE
    CHUNKS: tl.constexpr = (BLOCK_SIZE + TILE.BLOCK_N - 1) // TILE.BLOCK_N
    head = tl.program_id(0).to(tl.int64)
    b, h = head // Hkv, head % Hkv
    n = tl.arange(0, TILE.BLOCK_N)
    d = tl.arange(0, TILE.BLOCK_D)
    row = tl.arange(0, TILE.ROWS)
    k_ptr = k.ptr + b * k.b + h * k.h
    v_ptr = v.ptr + b * v.b + h * v.h
    step = tl.num_programs(1)
    num_steps = (Sq - tl.program_id(1) + step - 1) // step
    if tl.load(has_nonfinite_ptr + head) == 0:
        num_steps = 0
    for i in tl.range(0, num_steps):
        s = tl.program_id(1) + i * step
        position = Skv - Sq + s
        q_head = h * SHAPE.G + row
        q_row = (q.ptr + b * q.b + q_head * q.h + s.to(tl.int64) * q.s)[:, None]
        exists = (row < SHAPE.G)[:, None]
        mask = exists & (d < SHAPE.D)[None, :]
        loaded = tl.load(q_row + d[None, :] * q.d, mask=mask, other=0.0)
        softmax = Softmax(
            m_i=tl.full([TILE.ROWS], -1e30, tl.float32),
            l_i=tl.full([TILE.ROWS], 0.0, tl.float32),
            acc=tl.full([TILE.ROWS, TILE.BLOCK_D], 0.0, tl.float32),
        )
        lists_of_tile = head * num_tiles + s // SHAPE.TILE_TOKENS
        num = tl.minimum(tl.load(lists.num + lists_of_tile), lists.width)
        for j in tl.range(0, num * CHUNKS):
            slot = lists_of_tile * lists.width + j // CHUNKS
            # Clamp, so that a corrupt list cannot read out of bounds.
            block = tl.minimum(tl.maximum(tl.load(lists.idx + slot), 0), (Skv - 1) // BLOCK_SIZE)
            inner = j % CHUNKS * TILE.BLOCK_N + n
            key = block * BLOCK_SIZE + inner
            member = 1  # without membership bits a tile is one token
            if lists.membership is not None:
                token = s % SHAPE.TILE_TOKENS
                if SHAPE.TILE_TOKENS > 64:  # two words
                    slot += (lists_of_tile + token // 64) * lists.width
                    token = token % 64
                member = (tl.load(lists.membership + slot) >> token) & 1
            seen = (inner < BLOCK_SIZE) & (key <= tl.where(member != 0, position, -1))
            pages = None
            if SHAPE.PAGE > 0:
                pages = RowPages(table, seen)
            k_row = k_ptr + token_offset(k, key, pages, SHAPE.PAGE)[None, :]
            v_row = v_ptr + token_offset(v, key, pages, SHAPE.PAGE)[:, None] + d[None, :] * v.d
            softmax = add_seen_keys(
                softmax,
                RowTensor(loaded, q_row, exists, q.d),
                k_row,
                v_row,
                k.d,
                seen,
                qk_scale_log2,
                SHAPE.D,
                TILE.BLOCK_D,
                TILE.FP32,
            )
        lse_row = (b * Hkv * SHAPE.G + q_head) * Sq + s
        out_row = b * out.b + q_head * out.h + s.to(tl.int64) * out.s
        l_safe = tl.where(softmax.l_i == 0.0, 1.0, softmax.l_i)
        lse = (softmax.m_i + tl.log2(l_safe)) * LN2
        lse = tl.where(softmax.l_i == 0.0, float("-inf"), lse)
        tl.store(lse_ptr + lse_row, lse, mask=row < SHAPE.G)
        averaged = softmax.acc / l_safe[:, None]
        tl.store(out.ptr + out_row[:, None] + d[None, :] * out.d, averaged, mask=mask)
