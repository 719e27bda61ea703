"""Attention where keys or values hold nan or inf: slower, each row reads only what it sees.

The fast kernel multiplies a tile's rows with all its keys, and zero times nan is nan. Where a head
has such keys or values, and only there, this kernel writes the head's result again.
"""

import triton
import triton.language as tl

from infllm_flex_ops.block_attention.kernels.take_seen import take_seen


@triton.jit(do_not_specialize=["S"])
def find_special_kernel(
    k_ptr,
    v_ptr,
    special_ptr,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_vd,
    S,
    Hkv,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Set ``special`` of a head to 1 if some of its keys or values are not finite."""
    chunks = tl.cdiv(S, BLOCK_S)
    head = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = head // Hkv, head % Hkv
    s = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    mask = (s < S)[:, None] & (d < D)[None, :]
    k_row = k_ptr + b * stride_kb + h * stride_kh + s[:, None] * stride_ks
    v_row = v_ptr + b * stride_vb + h * stride_vh + s[:, None] * stride_vs
    k = tl.load(k_row + d[None, :] * stride_kd, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_row + d[None, :] * stride_vd, mask=mask, other=0.0).to(tl.float32)
    finite = (tl.abs(k) < float("inf")) & (tl.abs(v) < float("inf"))
    if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
        tl.store(special_ptr + head, 1)


@triton.jit(do_not_specialize=["Sq", "Skv", "num_tiles"])
def attend_carefully_kernel(
    special_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    num_ptr,
    idx_ptr,
    words_ptr,
    out_ptr,
    lse_ptr,
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
    stride_ob,
    stride_oh,
    stride_os,
    stride_od,
    Sq,
    Skv,
    num_tiles,
    width,
    factor,
    Hkv,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FP32: tl.constexpr,
):
    """Attend with every so many tokens of a head that has specials, one token at a time."""
    head = tl.program_id(0).to(tl.int64)
    b, h = head // Hkv, head % Hkv
    CHUNKS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    row = tl.arange(0, ROWS)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    step = tl.num_programs(1)
    num_steps = (Sq - tl.program_id(1) + step - 1) // step
    if tl.load(special_ptr + head) == 0:
        num_steps = 0
    for i in tl.range(0, num_steps):
        s = tl.program_id(1) + i * step
        position = Skv - Sq + s
        q_head = h * G + row
        q_row = (q_ptr + b * stride_qb + q_head * stride_qh + s.to(tl.int64) * stride_qs)[:, None]
        real = (row < G)[:, None]
        q = tl.load(q_row + d[None, :] * stride_qd, mask=real & (d < D)[None, :], other=0.0)
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        top = tl.full([ROWS], -1e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        lists = head * num_tiles + s // TILE_TOKENS
        num = tl.minimum(tl.load(num_ptr + lists), width)
        for j in tl.range(0, num * CHUNKS):
            slot = lists * width + j // CHUNKS
            block = tl.minimum(tl.maximum(tl.load(idx_ptr + slot), 0), (Skv - 1) // BLOCK_SIZE)
            inner = j % CHUNKS * BLOCK_N + n
            key = block * BLOCK_SIZE + inner
            member = 1  # of a tile of one token, if nothing else is said
            if words_ptr is not None:
                member = (tl.load(words_ptr + slot) >> (s % TILE_TOKENS)) & 1
            seen = (inner < BLOCK_SIZE) & (key <= tl.where(member != 0, position, -1))
            k_row = k_ptr + key.to(tl.int64)[None, :] * stride_ks
            v_row = v_ptr + key.to(tl.int64)[:, None] * stride_vs + d[None, :] * stride_vd
            acc, top, total = take_seen(
                acc,
                top,
                total,
                q,
                q_row,
                real,
                stride_qd,
                k_row,
                v_row,
                stride_kd,
                seen,
                factor,
                D,
                BLOCK_D,
                FP32,
            )
        lse_row = (b * Hkv * G + q_head) * Sq + s
        out_row = b * stride_ob + q_head * stride_oh + s.to(tl.int64) * stride_os
        lse = (top + tl.log2(tl.where(total == 0.0, 1.0, total))) * 0.6931471805599453
        lse = tl.where(total == 0.0, float("-inf"), lse)
        tl.store(lse_ptr + lse_row, lse, mask=row < G)
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_mask = real & (d < D)[None, :]
        tl.store(out_ptr + out_row[:, None] + d[None, :] * stride_od, out, mask=out_mask)
