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
    PART: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Weigh the parts of one head of one query by their log-sum-exp; 0 where it has no key."""
    parts_of_d = (D + PART - 1) // PART
    group = tl.program_id(0) // parts_of_d
    token = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) % parts_of_d * PART + tl.arange(0, PART)
    split = tl.arange(0, SPLITS)
    used = split < splits
    parts_ptr += ((head * n + token) * splits * ROWS + group) * (BLOCK_D + 2)
    part = parts_ptr + split * (ROWS * (BLOCK_D + 2))
    tops = tl.load(part + BLOCK_D, mask=used, other=-1e30)
    totals = tl.load(part + BLOCK_D + 1, mask=used, other=0.0)
    sums = tl.load(part[:, None] + d[None, :], mask=used[:, None], other=0.0)
    weight = tl.exp2(tops - tl.max(tops, 0))
    total = tl.sum(totals * weight, 0)
    out = tl.sum(sums * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    row = (head * G + group) * n + token  # head is b * Hkv + h
    tl.store(out_ptr + row * D + d, out, mask=d < D)
