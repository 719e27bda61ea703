"""Add up what several programs summed for one block, in order."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["Skv", "num_blocks", "num_shares"])
def reduce_kernel(
    shares_ptr,
    block_of_ptr,
    first_of_ptr,
    part_ptr,
    dk_ptr,
    dv_ptr,
    Skv,
    num_blocks,
    num_shares,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add up the shares of one block, in order; its first share's program does it."""
    CHUNKS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    share = (tl.program_id(0) // CHUNKS).to(tl.int64)
    head = share // num_shares
    block = tl.load(block_of_ptr + share)
    if (block < num_blocks) & (tl.load(first_of_ptr + share) == 0):
        inner = tl.program_id(0) % CHUNKS * BLOCK_N + tl.arange(0, BLOCK_N)
        key = block * BLOCK_SIZE + inner
        d = tl.arange(0, BLOCK_D)
        mask = ((inner < BLOCK_SIZE) & (key < Skv))[:, None] & (d < D)[None, :]
        slot = inner[:, None] * D + d[None, :]
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for i in range(tl.load(shares_ptr + head * num_blocks + block)):
            at = part_ptr + (share + i) * 2 * BLOCK_SIZE * D + slot
            dk += tl.load(at, mask=mask, other=0.0)
            dv += tl.load(at + BLOCK_SIZE * D, mask=mask, other=0.0)
        out = ((head * Skv + key)[:, None]) * D + d[None, :]
        tl.store(dk_ptr + out, dk, mask=mask)
        tl.store(dv_ptr + out, dv, mask=mask)
