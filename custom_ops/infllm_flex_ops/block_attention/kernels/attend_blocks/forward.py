"""Attention of tiles to their lists: a tile's rows walk the union of their tokens' blocks.

A row is one head of one token, ``token * G + head``; all rows of a tile share the loaded keys. A
bit per token says who takes part in a block: a row that does not measures its weights against
infinity, which makes them zero at no cost per key. Only the last blocks of a list can reach beyond
the tile's first token, so only they are tested key by key.
"""

import triton
import triton.language as tl

from infllm_flex_ops.triton_common.dot_in_parts import dot_in_parts


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
    IN_PARTS: tl.constexpr,
    BOXES: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Take the keys of some slots of a list into the running softmax of the rows."""
    CHUNKS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    CHECK: tl.constexpr = EDGE or BLOCK_SIZE % BLOCK_N != 0
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    last = (Skv - 1) // BLOCK_SIZE if EDGE else Skv // BLOCK_SIZE - 1
    for i in tl.range(begin * CHUNKS, end * CHUNKS):
        # No index, however wrong, leads out of the tensors.
        block = tl.minimum(tl.maximum(tl.load(idx_ptr + i // CHUNKS), 0), last)
        member = ((tl.load(words_ptr + i // CHUNKS) >> token) & 1) != 0
        inner = i % CHUNKS * BLOCK_N + n
        first = block * BLOCK_SIZE + i % CHUNKS * BLOCK_N
        key = first + n
        valid = inner < BLOCK_SIZE
        if EDGE:
            valid = valid & (key < Skv)
        k_row = k_ptr + key.to(tl.int64)[None, :] * stride_ks
        v_row = v_ptr + key.to(tl.int64)[:, None] * stride_vs + d[None, :] * stride_vd
        if IN_PARTS:
            logits = dot_in_parts(
                q_ptr, q_mask, stride_qd, k_row, valid[None, :], stride_kd, D, BLOCK_D
            )
        elif BOXES:
            k = k_boxes.load([b, h, first, 0]).reshape(BLOCK_N, BLOCK_D)
            logits = tl.dot(q, tl.trans(k))
        elif CHECK or D < BLOCK_D:
            k_mask = valid[None, :] & (d < D)[:, None]
            logits = tl.dot(q, tl.load(k_row + d[:, None] * stride_kd, mask=k_mask, other=0.0))
        else:
            logits = tl.dot(q, tl.load(k_row + d[:, None] * stride_kd))
        if EDGE:
            seen = valid[None, :] & (key[None, :] <= position[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        elif CHECK:
            logits = tl.where(valid[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.where(member, tl.max(logits, 1) * factor, float("-inf")))
        base = tl.where(member, new_top, float("inf"))
        weights = tl.exp2(logits * factor - base[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
        if BOXES:
            v = v_boxes.load([b, h, first, 0]).reshape(BLOCK_N, BLOCK_D)
        elif CHECK or D < BLOCK_D:
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
    k_boxes,
    v_boxes,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IN_PARTS: tl.constexpr,
    BOXES: tl.constexpr,
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
    num = tl.minimum(tl.load(num_ptr + lists), width)
    # So many blocks hold the tile's tokens at most, and lists ascend: the others are all past.
    EDGES: tl.constexpr = (TILE_TOKENS + BLOCK_SIZE - 2) // BLOCK_SIZE + 1
    num_past = tl.maximum(num - EDGES, 0)
    if Skv < BLOCK_SIZE:
        num_past = 0
    for EDGE in tl.static_range(2):
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
            IN_PARTS,
            BOXES,
            EDGE,
        )

    lse_row = (b * Hkv * G + q_head) * Sq + s
    out_row = b * stride_ob + q_head * stride_oh + s.to(tl.int64) * stride_os
    lse = (top + tl.log2(tl.where(total == 0.0, 1.0, total))) * 0.6931471805599453
    lse = tl.where(total == 0.0, float("-inf"), lse)
    tl.store(lse_ptr + lse_row, lse, mask=real)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_mask = q_mask & (d < D)[None, :]
    tl.store(out_ptr + out_row[:, None] + d[None, :] * stride_od, out, mask=out_mask)
