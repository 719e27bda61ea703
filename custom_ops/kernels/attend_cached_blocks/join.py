"""Join what programs found in parts of a list."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n", "splits"])
def join_kernel(
    parts_ptr,
    out_ptr,
    n,
    splits,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Weigh the parts of one head of one query by their log-sum-exp; 0 where it has no key."""
    group = tl.program_id(0)
    token = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    part = parts_ptr + ((head * n + token) * splits * ROWS + group) * (BLOCK_D + 2)
    acc = tl.zeros([BLOCK_D], tl.float32)
    top = -1e30
    total = 0.0
    for split in range(splits):
        at = part + split * (ROWS * (BLOCK_D + 2))
        part_top = tl.load(at + BLOCK_D)
        new_top = tl.maximum(top, part_top)
        shrink, grow = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
        acc = acc * shrink + tl.load(at + d) * grow
        total = total * shrink + tl.load(at + BLOCK_D + 1) * grow
        top = new_top
    out = acc / tl.where(total == 0.0, 1.0, total)
    row = (head * G + group) * n + token  # head is b * Hkv + h
    tl.store(out_ptr + row * D + d, out, mask=d < D)
