"""The gradients of keys and values: a block walks the tiles that listed it, in order.

A block that many tiles listed, as all list the first, is shared by several programs: each sums a
stretch of its tiles into a slot of its own, and ``reduce_kernel`` adds the slots up in order. No
atomics, so the bits repeat.
"""

import triton
import triton.language as tl

from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32

_VARYING = ["Sq", "Skv", "num_tiles", "num_blocks", "num_shares", "stretch", "heads_together"]


@triton.jit
def _walk(
    dk,
    dv,
    k,
    v,
    q_ptr,
    do_ptr,
    q_boxes,
    do_boxes,
    b,
    h,
    row_lse,
    row_delta,
    first_tile,
    k_ptr,
    v_ptr,
    stride_oh,
    stride_os,
    stride_od,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kd,
    stride_vd,
    begin,
    end,
    tile_of_ptr,
    word_of_ptr,
    key,
    valid,
    Sq,
    Skv,
    num_tiles,
    factor,
    G: tl.constexpr,
    D: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FP32: tl.constexpr,
    INDEX: tl.constexpr,
    USE_TMA: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add what the rows of some of a block's tiles contribute to its gradients."""
    HEADS: tl.constexpr = triton.next_power_of_2(G)
    BOX_TOKENS: tl.constexpr = ROWS // HEADS if USE_TMA else ROWS
    d = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, ROWS)
    for i in tl.range(begin * PARTS, end * PARTS):
        # No number, however wrong, leads out of the tensors.
        tile = tl.minimum(tl.maximum(tl.load(tile_of_ptr + i // PARTS), 0), num_tiles - 1)
        word = tl.load(word_of_ptr + i // PARTS)
        if USE_TMA:  # which hold head after head, and then zeros
            group = lane // BOX_TOKENS
            token = i % PARTS * BOX_TOKENS + lane % BOX_TOKENS
        else:
            group = (i % PARTS * ROWS + lane) % G
            token = (i % PARTS * ROWS + lane) // G
        member = ((word >> token) & 1) != 0
        # Offsets within a tile stay the same from tile to tile, and in registers.
        q_tile = q_ptr + tile.to(tl.int64) * TILE_TOKENS * stride_qs
        do_tile = do_ptr + tile.to(tl.int64) * TILE_TOKENS * stride_os
        q_row = q_tile + group.to(INDEX) * stride_qh + token * stride_qs
        do_row = do_tile + group.to(INDEX) * stride_oh + token * stride_os
        if USE_TMA:
            first = tile * TILE_TOKENS + i % PARTS * BOX_TOKENS
            q = q_boxes.load([b, h, 0, first, 0]).reshape(ROWS, BLOCK_D)
            do = do_boxes.load([b, h, 0, first, 0]).reshape(ROWS, BLOCK_D)
        else:
            s = tile * TILE_TOKENS + token
            real = (token < TILE_TOKENS) & (s < Sq)
            row_mask = real[:, None] & (d < D)[None, :]
            q = tl.load(q_row[:, None] + d[None, :] * stride_qd, mask=row_mask, other=0.0)
            do = tl.load(do_row[:, None] + d[None, :] * stride_od, mask=row_mask, other=0.0)
        # Infinite is the log-sum-exp where there is no row.
        if USE_TMA:
            at = (first_tile + tile) * PARTS + i % PARTS
            lse = row_lse.load([at, 0]).reshape(ROWS)
            delta = row_delta.load([at, 0]).reshape(ROWS)
        else:
            row = tile.to(tl.int64) * (PARTS * ROWS) + i % PARTS * ROWS + lane
            lse = tl.load(row_lse + row)
            delta = tl.load(row_delta + row)
        if FP32:
            logits = dot_fp32(
                k_ptr,
                valid[:, None],
                stride_kd,
                q_row[None, :],
                real[None, :],
                stride_qd,
                D,
                BLOCK_D,
            )
        else:
            logits = tl.dot(k, tl.trans(q))
        weights = tl.exp2(logits * factor - tl.where(member, lse, float("inf"))[None, :])
        if EDGE:
            ahead = key - (Skv - Sq) - tile * TILE_TOKENS
            weights = tl.where(ahead[:, None] <= token[None, :], weights, 0.0)
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
        if FP32:
            dweights = dot_fp32(
                v_ptr,
                valid[:, None],
                stride_vd,
                do_row[None, :],
                real[None, :],
                stride_od,
                D,
                BLOCK_D,
            )
        else:
            dweights = tl.dot(v, tl.trans(do))
        dlogits = weights * (dweights - delta[None, :])
        dk = tl.dot(dlogits.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=_VARYING)
def dkv_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    do_boxes,
    q_boxes,
    row_lse,
    row_delta,
    begin_ptr,
    count_ptr,
    tile_of_ptr,
    word_of_ptr,
    shares_ptr,
    block_of_ptr,
    first_of_ptr,
    dk_ptr,
    dv_ptr,
    part_ptr,
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
    num_blocks,
    num_shares,
    stretch,
    scale,
    Hkv,
    heads,
    heads_together,
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
    INDEX: tl.constexpr,
):
    """Fill ``dk`` and ``dv`` for some keys of one block, or a slot of ``part`` for a share of it.

    A few heads at a time, so that the rows of their queries, which blocks walk at about the same
    time, are found in L2; of these heads shared blocks come first, as they take longest.
    """
    CHUNKS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    per_head = (num_shares + num_blocks) * CHUNKS
    first_head = tl.program_id(0) // (heads_together * per_head) * heads_together
    of_these = tl.program_id(0) - first_head * per_head
    num_heads = tl.minimum(heads_together, heads - first_head)
    head = (first_head + of_these % num_heads).to(tl.int64)
    chunk = of_these // num_heads % CHUNKS
    task = of_these // num_heads // CHUNKS
    b, h = head // Hkv, head % Hkv
    is_share = task < num_shares
    share = head * num_shares + tl.minimum(task, num_shares - 1)
    block = task - num_shares
    skipped = 0
    if is_share:
        block = tl.load(block_of_ptr + share)
        skipped = tl.load(first_of_ptr + share) * stretch
    if (block < num_blocks) & (block >= 0):
        begin = tl.load(begin_ptr + head * num_blocks + block) + skipped
        count = tl.load(count_ptr + head * num_blocks + block) - skipped
        shared = tl.load(shares_ptr + head * num_blocks + block) > 0
        if is_share:
            count = tl.minimum(count, stretch)
        if is_share | (shared == 0):
            inner = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
            key = block * BLOCK_SIZE + inner
            valid = (inner < BLOCK_SIZE) & (key < Skv)
            d = tl.arange(0, BLOCK_D)
            key_mask = valid[:, None] & (d < D)[None, :]
            k_row = k_ptr + b * stride_kb + h * stride_kh + key.to(tl.int64)[:, None] * stride_ks
            v_row = v_ptr + b * stride_vb + h * stride_vh + key.to(tl.int64)[:, None] * stride_vs
            k = key_mask  # unused in parts
            v = key_mask
            if not FP32:
                k = tl.load(k_row + d[None, :] * stride_kd, mask=key_mask, other=0.0)
                v = tl.load(v_row + d[None, :] * stride_vd, mask=key_mask, other=0.0)
            if not USE_TMA:
                row_lse += head * num_tiles * (PARTS * ROWS)
                row_delta += head * num_tiles * (PARTS * ROWS)
            dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            # So many tiles hold the block's tokens at most; all other tiles are later.
            EDGES: tl.constexpr = (BLOCK_SIZE + TILE_TOKENS - 2) // TILE_TOKENS + 1
            num_edges = tl.minimum(tl.maximum(EDGES - skipped, 0), count)
            for LATER in tl.static_range(2):
                dk, dv = _walk(
                    dk,
                    dv,
                    k,
                    v,
                    q_ptr + b * stride_qb + h * G * stride_qh,
                    do_ptr + b * stride_ob + h * G * stride_oh,
                    q_boxes,
                    do_boxes,
                    b.to(tl.int32),
                    h.to(tl.int32),
                    row_lse,
                    row_delta,
                    head.to(tl.int32) * num_tiles,
                    k_row,
                    v_row,
                    stride_oh,
                    stride_os,
                    stride_od,
                    stride_qh,
                    stride_qs,
                    stride_qd,
                    stride_kd,
                    stride_vd,
                    num_edges if LATER else 0,
                    count if LATER else num_edges,
                    tile_of_ptr + begin,
                    word_of_ptr + begin,
                    key,
                    valid,
                    Sq,
                    Skv,
                    num_tiles,
                    scale * 1.4426950408889634,
                    G,
                    D,
                    TILE_TOKENS,
                    PARTS,
                    ROWS,
                    BLOCK_D,
                    FP32,
                    INDEX,
                    USE_TMA,
                    not LATER,
                )
            if is_share:
                slot = (share * 2 * BLOCK_SIZE + inner)[:, None] * D + d[None, :]
                slot_mask = (inner < BLOCK_SIZE)[:, None] & (d < D)[None, :]
                tl.store(part_ptr + slot, dk * scale, mask=slot_mask)
                tl.store(part_ptr + slot + BLOCK_SIZE * D, dv, mask=slot_mask)
            else:
                out = ((head * Skv + key)[:, None]) * D + d[None, :]
                tl.store(dk_ptr + out, dk * scale, mask=key_mask)
                tl.store(dv_ptr + out, dv, mask=key_mask)
