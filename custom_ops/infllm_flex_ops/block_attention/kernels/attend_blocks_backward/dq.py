"""The gradient of the queries: a tile's rows walk its lists again, as in the forward pass."""

import triton
import triton.language as tl

from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32


@triton.jit
def _walk(
    dq,
    q,
    do,
    q_ptr,
    do_ptr,
    row_mask,
    stride_qd,
    stride_gd,
    lse,
    delta,
    k_ptr,
    v_ptr,
    k_boxes,
    v_boxes,
    b,
    h,
    stride_ks,
    stride_kd,
    stride_vs,
    stride_vd,
    begin,
    end,
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
    FP32: tl.constexpr,
    USE_TMA: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add what the keys of some slots of a list contribute to the gradient of the rows."""
    CHUNKS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    CHECK: tl.constexpr = EDGE or BLOCK_SIZE % BLOCK_N != 0
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    last = (Skv - 1) // BLOCK_SIZE if EDGE else Skv // BLOCK_SIZE - 1
    for i in tl.range(begin * CHUNKS, end * CHUNKS):
        block = tl.minimum(tl.maximum(tl.load(idx_ptr + i // CHUNKS), 0), last)
        member = ((tl.load(words_ptr + i // CHUNKS) >> token) & 1) != 0
        inner = i % CHUNKS * BLOCK_N + n
        first = block * BLOCK_SIZE + i % CHUNKS * BLOCK_N
        key = first + n
        valid = inner < BLOCK_SIZE
        if EDGE:
            valid = valid & (key < Skv)
        k_row = k_ptr + key.to(tl.int64)[:, None] * stride_ks + d[None, :] * stride_kd
        v_row = v_ptr + key.to(tl.int64)[:, None] * stride_vs + d[None, :] * stride_vd
        if USE_TMA:
            k = k_boxes.load([b, h, first, 0]).reshape(BLOCK_N, BLOCK_D)
        elif CHECK or D < BLOCK_D:
            key_mask = valid[:, None] & (d < D)[None, :]
            k = tl.load(k_row, mask=key_mask, other=0.0)
        else:
            k = tl.load(k_row)
        if FP32:
            k_column = k_ptr + key.to(tl.int64)[None, :] * stride_ks
            v_column = v_ptr + key.to(tl.int64)[None, :] * stride_vs
            logits = dot_fp32(
                q_ptr, row_mask, stride_qd, k_column, valid[None, :], stride_kd, D, BLOCK_D
            )
            dweights = dot_fp32(
                do_ptr, row_mask, stride_gd, v_column, valid[None, :], stride_vd, D, BLOCK_D
            )
        else:
            if USE_TMA:
                v = v_boxes.load([b, h, first, 0]).reshape(BLOCK_N, BLOCK_D)
            elif CHECK or D < BLOCK_D:
                v = tl.load(v_row, mask=key_mask, other=0.0)
            else:
                v = tl.load(v_row)
            logits = tl.dot(q, tl.trans(k))
            dweights = tl.dot(do, tl.trans(v))
        weights = tl.exp2(logits * factor - tl.where(member, lse, float("inf"))[:, None])
        if EDGE:
            seen = valid[None, :] & (key[None, :] <= position[:, None])
            weights = tl.where(seen, weights, 0.0)
        elif CHECK:
            weights = tl.where(valid[None, :], weights, 0.0)
        dlogits = weights * (dweights - delta[:, None])
        dq = tl.dot(dlogits.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["Sq", "Skv", "num_tiles"])
def dq_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    k_boxes,
    v_boxes,
    out_ptr,
    lse_ptr,
    num_ptr,
    idx_ptr,
    words_ptr,
    row_lse_ptr,
    row_delta_ptr,
    dq_ptr,
    stride_gb,
    stride_gh,
    stride_gs,
    stride_gd,
    stride_ob,
    stride_oh,
    stride_os,
    stride_od,
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
    FP32: tl.constexpr,
    USE_TMA: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BOX_TOKENS: tl.constexpr,
    BOX_ROWS: tl.constexpr,
):
    """Fill ``dq`` for some rows, and what their gradients of keys and values are computed from.

    ``row_lse`` is their log-sum-exp, of base 2, ``row_delta`` the dot product of the output and its
    gradient; both ``[B * Hkv, num_tiles, TILE_ROWS]``, in boxes of ``BOX_ROWS`` rows, head after
    head, of ``BOX_TOKENS`` tokens each; 0: in the tile's order. ``g`` in strides is the gradient of
    the output, ``o`` the output and the gradient of ``q``.
    """
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
    mask = real[:, None] & (d < D)[None, :]
    q_ptr += (b * stride_qb + q_head * stride_qh + s.to(tl.int64) * stride_qs)[:, None]
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    flat = (b * Hkv * G + q_head) * Sq + s
    do_ptr += (b * stride_gb + q_head * stride_gh + s.to(tl.int64) * stride_gs)[:, None]
    out_row = (b * stride_ob + q_head * stride_oh + s.to(tl.int64) * stride_os)[:, None]
    do = tl.load(do_ptr + d[None, :] * stride_gd, mask=mask, other=0.0)
    out = tl.load(out_ptr + out_row + d[None, :] * stride_od, mask=mask, other=0.0)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + flat, mask=real, other=0.0) * 1.4426950408889634
    place = row
    if BOX_TOKENS > 0:
        place = token // BOX_TOKENS * BOX_ROWS + row % G * BOX_TOKENS + token % BOX_TOKENS
    place += (head * num_tiles + tile) * TILE_ROWS
    tl.store(row_lse_ptr + place, lse, mask=real)
    tl.store(row_delta_ptr + place, delta, mask=real)
    q = do  # unused in parts
    if not FP32:
        q = tl.load(q_ptr + d[None, :] * stride_qd, mask=mask, other=0.0)

    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    factor = scale * 1.4426950408889634
    lists = head * num_tiles + tile
    num = tl.minimum(tl.load(num_ptr + lists), width)
    EDGES: tl.constexpr = (TILE_TOKENS + BLOCK_SIZE - 2) // BLOCK_SIZE + 1
    num_past = tl.maximum(num - EDGES, 0)
    if Skv < BLOCK_SIZE:
        num_past = 0
    for EDGE in tl.static_range(2):
        dq = _walk(
            dq,
            q,
            do,
            q_ptr,
            do_ptr,
            real[:, None],
            stride_qd,
            stride_gd,
            lse,
            delta,
            k_ptr,
            v_ptr,
            k_boxes,
            v_boxes,
            b.to(tl.int32),
            h.to(tl.int32),
            stride_ks,
            stride_kd,
            stride_vs,
            stride_vd,
            num_past if EDGE else 0,
            num if EDGE else num_past,
            idx_ptr + lists * width,
            words_ptr + lists * width,
            token,
            position,
            Skv,
            factor,
            D,
            BLOCK_SIZE,
            BLOCK_N,
            BLOCK_D,
            FP32,
            USE_TMA,
            EDGE,
        )
    tl.store(dq_ptr + out_row + d[None, :] * stride_od, dq * scale, mask=mask)
