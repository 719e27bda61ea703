"""Attention of one query to some of its blocks, where they lie in the cache."""

import triton
import triton.language as tl

from infllm_flex_ops.block_attention.kernels.exact_reads import add_seen_keys
from infllm_flex_ops.block_attention.kernels.tile_args import RowTensor
from infllm_flex_ops.triton_common.tensor_args import Softmax


@triton.jit(do_not_specialize=["n", "S", "W", "slots"])
def split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    selected_ptr,
    start_ptr,
    end_ptr,
    parts_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_vd,
    stride_sb,
    stride_sh,
    stride_ss,
    stride_sw,
    n,
    S,
    W,
    slots,
    factor,
    Hkv,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FP32: tl.constexpr,
):
    """Fill ``parts [B * Hkv, n, splits, ROWS, BLOCK_D + 2]``: sums of values, largest, total.

    A row is a head of the query's group. A program takes every so many-th slot of the list: the
    unused ones, all at its end, then lie with all programs alike.
    """
    split = tl.program_id(0)
    token = tl.program_id(1)
    head = tl.program_id(2)
    b = (head // Hkv).to(tl.int64)
    h = (head % Hkv).to(tl.int64)
    first = tl.load(start_ptr + b)
    position = tl.load(end_ptr + b) - first - n + token
    group = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    q_ptr += (b * stride_qb + (h * G + group) * stride_qh + token.to(tl.int64) * stride_qs)[:, None]
    q_mask = (group < G)[:, None]
    q = q_mask  # unused in parts
    if not FP32:
        q = tl.load(q_ptr + d[None, :] * stride_qd, mask=q_mask & (d < D)[None, :], other=0.0)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    selected_ptr += b * stride_sb + h * stride_sh + token.to(tl.int64) * stride_ss

    softmax = Softmax(
        m_i=tl.full([ROWS], -1e30, tl.float32),  # finite: a row without a key makes no NaN
        l_i=tl.zeros([ROWS], tl.float32),
        acc=tl.zeros([ROWS, BLOCK_D], tl.float32),
    )
    CHUNKS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    splits = tl.num_programs(0)
    for i in tl.range(0, slots * CHUNKS):
        slot = split + i // CHUNKS * splits
        block = tl.load(selected_ptr + slot * stride_sw, mask=slot < W, other=-1)
        inner = i % CHUNKS * BLOCK_N + tl.arange(0, BLOCK_N)
        key = block.to(tl.int64) * BLOCK_SIZE + inner
        valid = (inner < BLOCK_SIZE) & (key >= 0)  # a slot that is not used names block -1
        valid = valid & (key <= position) & (first + key < S)
        k_row = k_ptr + (first + key)[None, :] * stride_ks
        v_row = v_ptr + (first + key)[:, None] * stride_vs + d[None, :] * stride_vd
        rows = RowTensor(q, q_ptr, q_mask, stride_qd)
        softmax = add_seen_keys(
            softmax, rows, k_row, v_row, stride_kd, valid, factor, D, BLOCK_D, FP32
        )

    at = (head.to(tl.int64) * n + token) * splits + split
    part = parts_ptr + at * (ROWS * (BLOCK_D + 2)) + group * (BLOCK_D + 2)
    tl.store(part[:, None] + d[None, :], softmax.acc)
    tl.store(part + BLOCK_D, softmax.m_i)
    tl.store(part + BLOCK_D + 1, softmax.l_i)
