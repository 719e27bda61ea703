"""Attention of tiles to their lists: a tile's rows walk its full list, then its partial list.

A row is one head of one token, ``token * G + head``; all rows of a tile share the loaded keys. In
the partial list a bit per token says who takes part, so exactness costs no loads of its own. Keys
that a row does not see weigh exactly zero: its output stays clean as long as values are finite.
"""

import triton
import triton.language as tl

from custom_ops.kernels.dot_in_parts import dot_in_parts


@triton.jit
def _walk(
    acc,
    top,
    total,
    q,
    q_ptr,
    q_mask,
    stride_qd,
    k_ptr,
    v_ptr,
    stride_ks,
    stride_kd,
    stride_vs,
    stride_vd,
    num,
    idx_ptr,
    words_ptr,
    token,
    position,
    Skv,
    factor,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Take the keys of a list's blocks into the running softmax of the rows."""
    CHUNKS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    CHECK: tl.constexpr = PARTIAL or BLOCK_SIZE % BLOCK_N != 0
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    for i in tl.range(0, num * CHUNKS):
        inner = i % CHUNKS * BLOCK_N + n
        key = tl.load(idx_ptr + i // CHUNKS) * BLOCK_SIZE + inner
        valid = inner < BLOCK_SIZE
        seen = valid[None, :]
        if PARTIAL:
            valid = valid & (key < Skv)
            member = ((tl.load(words_ptr + i // CHUNKS) >> token) & 1) != 0
            seen = member[:, None] & valid[None, :] & (key[None, :] <= position[:, None])
        k_row = k_ptr + key.to(tl.int64)[None, :] * stride_ks
        v_row = v_ptr + key.to(tl.int64)[:, None] * stride_vs + d[None, :] * stride_vd
        if IN_PARTS:
            logits = dot_in_parts(
                q_ptr, q_mask, stride_qd, k_row, valid[None, :], stride_kd, D, BLOCK_D
            )
        elif CHECK or D < BLOCK_D:
            k_mask = valid[None, :] & (d < D)[:, None]
            logits = tl.dot(q, tl.load(k_row + d[:, None] * stride_kd, mask=k_mask, other=0.0))
        else:
            logits = tl.dot(q, tl.load(k_row + d[:, None] * stride_kd))
        if CHECK:
            logits = tl.where(seen, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1) * factor)
        weights = tl.exp2(logits * factor - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
        if CHECK or D < BLOCK_D:
            v = tl.load(v_row, mask=valid[:, None] & (d < D)[None, :], other=0.0)
        else:
            v = tl.load(v_row)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit(do_not_specialize=["Sq", "Skv", "num_tiles"])
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    kv_num_ptr,
    kv_idx_ptr,
    words_ptr,
    full_num_ptr,
    full_idx_ptr,
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
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """Attend with some rows of one tile, of one KV head."""
    part = tl.program_id(0) % PARTS
    tile = tl.program_id(0) // PARTS % num_tiles
    head = (tl.program_id(0) // PARTS // num_tiles).to(tl.int64)
    b, h = head // Hkv, head % Hkv
    row = part * ROWS + tl.arange(0, ROWS)
    token = row // G
    s = tile * TILE_TOKENS + token
    position = Skv - Sq + s
    q_head = h * G + row % G
    real = (token < TILE_TOKENS) & (s < Sq)
    d = tl.arange(0, BLOCK_D)
    q_ptr += (b * stride_qb + q_head * stride_qh + s.to(tl.int64) * stride_qs)[:, None]
    q_mask = real[:, None]
    q = q_mask  # unused in parts
    if not IN_PARTS:
        q = tl.load(q_ptr + d[None, :] * stride_qd, mask=q_mask & (d < D)[None, :], other=0.0)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh

    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    top = tl.full([ROWS], -1e30, tl.float32)  # finite: a row that has seen nothing makes no NaN
    total = tl.zeros([ROWS], tl.float32)
    lists = head * num_tiles + tile
    acc, top, total = _walk(
        acc,
        top,
        total,
        q,
        q_ptr,
        q_mask,
        stride_qd,
        k_ptr,
        v_ptr,
        stride_ks,
        stride_kd,
        stride_vs,
        stride_vd,
        tl.load(full_num_ptr + lists),
        full_idx_ptr + lists * width,
        words_ptr + lists * width,
        token,
        position,
        Skv,
        factor,
        D,
        BLOCK_SIZE,
        BLOCK_N,
        BLOCK_D,
        IN_PARTS,
        PARTIAL=False,
    )
    acc, top, total = _walk(
        acc,
        top,
        total,
        q,
        q_ptr,
        q_mask,
        stride_qd,
        k_ptr,
        v_ptr,
        stride_ks,
        stride_kd,
        stride_vs,
        stride_vd,
        tl.load(kv_num_ptr + lists),
        kv_idx_ptr + lists * width,
        words_ptr + lists * width,
        token,
        position,
        Skv,
        factor,
        D,
        BLOCK_SIZE,
        BLOCK_N,
        BLOCK_D,
        IN_PARTS,
        PARTIAL=True,
    )

    out_row = (b * Hkv * G + q_head) * Sq + s
    lse = (top + tl.log2(tl.where(total == 0.0, 1.0, total))) * 0.6931471805599453
    lse = tl.where(total == 0.0, float("-inf"), lse)
    tl.store(lse_ptr + out_row, lse, mask=real)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_mask = q_mask & (d < D)[None, :]
    tl.store(out_ptr + out_row[:, None] * D + d[None, :], out, mask=out_mask)
