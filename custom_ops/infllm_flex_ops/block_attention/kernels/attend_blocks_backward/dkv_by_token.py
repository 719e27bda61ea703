"""Gradients of a block's keys and values from the tokens that selected it, wherever they are.

A tile's rows also hold tokens that did not select the block, whose products are masked. Here each
row of a step counts. Rows cannot be loaded by TMA, as the tokens of a step do not lie together.
"""

import triton
import triton.language as tl


@triton.jit
def add_tokens(
    dk,
    dv,
    keys,
    queries,
    tokens,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add the rows of some tokens, tiles of one each, to the gradients of a block."""
    HEADS: tl.constexpr = triton.next_power_of_2(SHAPE.G)
    STEP: tl.constexpr = TILE.ROWS // HEADS  # tokens
    q, do, k, v = queries.q, queries.do, keys.k, keys.v
    d = tl.arange(0, TILE.BLOCK_D)
    lane = tl.arange(0, TILE.ROWS)
    group = lane % HEADS
    n = tokens.begin + lane // HEADS
    # The tokens of the next step are read a step ahead.
    token = tl.load(tokens.tile + n, mask=n < tokens.end, other=0)
    for i in tl.range(tokens.begin, tokens.end, STEP):
        n = i + lane // HEADS
        exists = (n < tokens.end) & (group < SHAPE.G)
        # Clamp, so that a corrupt list cannot read out of bounds.
        s = tl.minimum(tl.maximum(token, 0), queries.Sq - 1)
        token = tl.load(tokens.tile + n + STEP, mask=n + STEP < tokens.end, other=0)
        q_row = q.ptr + s.to(tl.int64) * q.s + group.to(tl.int64) * q.h
        do_row = do.ptr + s.to(tl.int64) * do.s + group.to(tl.int64) * do.h
        row_mask = exists[:, None] & (d < SHAPE.D)[None, :]
        q_rows = tl.load(q_row[:, None] + d[None, :] * q.d, mask=row_mask, other=0.0)
        do_rows = tl.load(do_row[:, None] + d[None, :] * do.d, mask=row_mask, other=0.0)
        row = s * SHAPE.G + group
        lse = tl.load(queries.row_lse + row, mask=exists, other=float("inf"))
        delta = tl.load(queries.row_delta + row, mask=exists, other=0.0)
        logits = tl.dot(k.loaded, tl.trans(q_rows)) * queries.qk_scale_log2
        weights = tl.exp2(logits - lse[None, :])
        if EDGE:
            ahead = keys.position - queries.offset
            weights = tl.where(ahead[:, None] <= s[None, :], weights, 0.0)
        dv = tl.dot(weights.to(do_rows.dtype), do_rows, dv, input_precision="ieee")
        dweights = tl.dot(v.loaded, tl.trans(do_rows))
        dlogits = weights * (dweights - delta[None, :])
        dk = tl.dot(dlogits.to(q_rows.dtype), q_rows, dk, input_precision="ieee")
    return dk, dv
