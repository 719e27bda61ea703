"""Add what several programs summed for one block, in order."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["Skv", "num_blocks", "max_splits"])
def reduce_kernel(
    splits,
    grads,
    Skv,
    num_blocks,
    max_splits,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the slots of one block's splits, in order. The program of its first split does it."""
    CHUNKS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    split = (tl.program_id(0) // CHUNKS).to(tl.int64)
    head = split // max_splits
    block = tl.load(splits.block + split)
    if (block < num_blocks) & (tl.load(splits.number + split) == 0):
        inner = tl.program_id(0) % CHUNKS * BLOCK_N + tl.arange(0, BLOCK_N)
        key = block * BLOCK_SIZE + inner
        d = tl.arange(0, BLOCK_D)
        mask = ((inner < BLOCK_SIZE) & (key < Skv))[:, None] & (d < D)[None, :]
        slot = inner[:, None] * D + d[None, :]
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for i in range(tl.load(splits.per_block + head * num_blocks + block)):
            at = grads.partial + (split + i) * 2 * BLOCK_SIZE * D + slot
            dk += tl.load(at, mask=mask, other=0.0)
            dv += tl.load(at + BLOCK_SIZE * D, mask=mask, other=0.0)
        out = ((head * Skv + key)[:, None]) * D + d[None, :]
        tl.store(grads.dk + out, dk, mask=mask)
        tl.store(grads.dv + out, dv, mask=mask)
