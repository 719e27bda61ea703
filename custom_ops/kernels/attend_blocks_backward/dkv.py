"""The gradients of keys and values: a block walks the tiles that listed it, in order."""

import triton
import triton.language as tl

from custom_ops.kernels.dot_in_parts import dot_in_parts


@triton.jit(do_not_specialize=["Sq", "Skv", "num_blocks"])
def dkv_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    begin_ptr,
    count_ptr,
    tile_of_ptr,
    word_of_ptr,
    dk_ptr,
    dv_ptr,
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
    num_blocks,
    scale,
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
    """Fill ``dk`` and ``dv`` for some keys of one block; one program sums, so order is fixed."""
    CHUNKS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    heads = tl.num_programs(0) // (num_blocks * CHUNKS)
    head = (tl.program_id(0) % heads).to(tl.int64)  # the busiest blocks, the first, start first
    chunk = tl.program_id(0) // heads % CHUNKS
    block = tl.program_id(0) // heads // CHUNKS
    b, h = head // Hkv, head % Hkv
    inner = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    key = block * BLOCK_SIZE + inner
    valid = (inner < BLOCK_SIZE) & (key < Skv)
    d = tl.arange(0, BLOCK_D)
    key_mask = valid[:, None] & (d < D)[None, :]
    k_ptr += b * stride_kb + h * stride_kh + key.to(tl.int64)[:, None] * stride_ks
    v_ptr += b * stride_vb + h * stride_vh + key.to(tl.int64)[:, None] * stride_vs
    if not IN_PARTS:
        k = tl.load(k_ptr + d[None, :] * stride_kd, mask=key_mask, other=0.0)
        v = tl.load(v_ptr + d[None, :] * stride_vd, mask=key_mask, other=0.0)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    factor = scale * 1.4426950408889634
    lane = tl.arange(0, ROWS)
    begin = tl.load(begin_ptr + head * num_blocks + block)
    count = tl.load(count_ptr + head * num_blocks + block)
    for i in tl.range(0, count * PARTS):
        tile = tl.load(tile_of_ptr + begin + i // PARTS)
        word = tl.load(word_of_ptr + begin + i // PARTS)
        row = i % PARTS * ROWS + lane
        token = row // G
        s = tile * TILE_TOKENS + token
        q_head = h * G + row % G
        real = (token < TILE_TOKENS) & (s < Sq)
        flat = (b * Hkv * G + q_head) * Sq + s
        row_mask = real[:, None] & (d < D)[None, :]
        q_row = b * stride_qb + q_head * stride_qh + s.to(tl.int64) * stride_qs
        q = tl.load(q_ptr + q_row[:, None] + d[None, :] * stride_qd, mask=row_mask, other=0.0)
        do = tl.load(do_ptr + flat[:, None] * D + d[None, :], mask=row_mask, other=0.0)
        lse = tl.load(lse_ptr + flat, mask=real, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + flat, mask=real, other=0.0)
        if IN_PARTS:
            logits = dot_in_parts(
                k_ptr,
                valid[:, None],
                stride_kd,
                q_ptr + q_row[None, :],
                real[None, :],
                stride_qd,
                D,
                BLOCK_D,
            )
            dweights = dot_in_parts(
                v_ptr,
                valid[:, None],
                stride_vd,
                do_ptr + flat[None, :] * D,
                real[None, :],
                1,
                D,
                BLOCK_D,
            )
        else:
            logits = tl.dot(k, tl.trans(q))
            dweights = tl.dot(v, tl.trans(do))
        member = real & (((word >> token) & 1) != 0)
        seen = member[None, :] & (key[:, None] <= (Skv - Sq + s)[None, :])
        weights = tl.where(seen, tl.exp2(logits * factor - lse[None, :]), 0.0)
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
        dlogits = weights * (dweights - delta[None, :])
        dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision="ieee")

    out = ((head * Skv + key)[:, None]) * D + d[None, :]
    tl.store(dk_ptr + out, dk * scale, mask=key_mask)
    tl.store(dv_ptr + out, dv, mask=key_mask)
