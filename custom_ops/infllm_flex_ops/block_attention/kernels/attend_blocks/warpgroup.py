"""What a warpgroup does with its 64 rows of a tile."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from infllm_flex_ops.block_attention.kernels.attend_blocks.ring import advance, first_key

ROWS = gl.constexpr(64)  # what one of its matrix instructions takes


@gluon.jit
def _weigh(
    logits,
    top,
    total,
    member,
    first,
    position,
    Skv,
    factor,
    n,
    EDGE: gl.constexpr,
):
    """Take a block's logits into the running softmax of the rows that are members."""
    if EDGE:
        key = first + n
        seen = (key < Skv)[None, :] & (key[None, :] <= position[:, None])
        logits = gl.where(seen, logits, float("-inf"))
    new_top = gl.maximum(top, gl.where(member, gl.max(logits, 1) * factor, float("-inf")))
    base = gl.where(member, new_top, float("inf"))
    weights = gl.exp2(logits * factor - base[:, None])
    shrink = gl.exp2(top - new_top)
    return weights, new_top, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def attend_rows(
    GROUP: gl.constexpr,
    inputs,
    G: gl.constexpr,
    D: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE_TOKENS: gl.constexpr,
    BLOCK_D: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Attend with 64 rows of a tile to the blocks that a token of theirs has chosen."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_SIZE, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    ring, pointers, strides, lengths = inputs
    keys, values, full, empty = ring
    q_ptr, idx_ptr, words_ptr, out_ptr, lse_ptr = pointers
    stride_qh, stride_qs, stride_qd, stride_oh, stride_os, stride_od = strides
    start, num, num_past, last, Sq, Skv, factor = lengths
    dtype: gl.constexpr = q_ptr.dtype.element_ty

    row = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LOADED))
    d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LOADED))
    s = start + row // G
    mask = ((row // G < TILE_TOKENS) & (s < Sq))[:, None] & (d < D)[None, :]
    q_row = (row % G) * stride_qh + s.to(gl.int64) * stride_qs
    q = gl.load(q_ptr + q_row[:, None] + d[None, :] * stride_qd, mask=mask, other=0.0)
    q = gl.convert_layout(q, gl.DotOperandLayout(0, LOGITS, 2))

    row = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
    n = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, LOGITS))
    token = row // G
    s = start + token
    position = Skv - Sq + s
    no_logits = gl.zeros([ROWS, BLOCK_SIZE], gl.float32, LOGITS)
    top = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, LOGITS))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS))
    acc = gl.zeros([ROWS, BLOCK_D], gl.float32, SUMS)

    # The bits of the tokens that have a row here.
    FIRST_TOKEN: gl.constexpr = GROUP * ROWS // G
    TOKENS: gl.constexpr = (GROUP * ROWS + ROWS - 1) // G - FIRST_TOKEN + 1
    MINE: gl.constexpr = (1 << TOKENS) - 1

    i = 0
    slot = 0
    phase = 0
    word = gl.load(words_ptr, mask=num > 0, other=0)
    while (i < num) & (((word >> FIRST_TOKEN) & MINE) == 0):
        mbarrier.wait(full.index(slot), phase)
        mbarrier.arrive(empty.index(slot))
        i += 1
        slot, phase = advance(slot, phase, SLOTS)
        word = gl.load(words_ptr + gl.minimum(i, num - 1))
    if i < num:
        mbarrier.wait(full.index(slot), phase)
        k = keys.index(slot).reshape([BLOCK_SIZE, BLOCK_D]).permute((1, 0))
        logits = warpgroup_mma(q, k, no_logits, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(0, deps=[logits])
        member = ((word >> token) & 1) != 0
        first = first_key(gl.load(idx_ptr + i), last, BLOCK_SIZE)
        weights, top, total, shrink = _weigh(
            logits, top, total, member, first, position, Skv, factor, n, EDGE=True
        )
        # From here on the values of the block before are summed while the next is weighed.
        weights = gl.convert_layout(weights.to(dtype), WEIGHTS)
        before = slot
        taken = i
        begin = i + 1
        slot, phase = advance(slot, phase, SLOTS)
        mbarrier.wait(full.index(slot), phase, pred=begin < num)
        word = gl.load(words_ptr + gl.minimum(begin, num - 1))
        for EDGE in gl.static_range(2):
            for i in range(begin, num if EDGE else num_past):
                coming = gl.load(words_ptr + gl.minimum(i + 1, num - 1))
                next_slot, next_phase = advance(slot, phase, SLOTS)
                chosen = ((word >> FIRST_TOKEN) & MINE) != 0
                # The slot before is held until then: the ring must not run out of others. A block
                # of which no row is a member leaves all bits as they are.
                if chosen | (i - taken >= SLOTS - 2):
                    k = keys.index(slot).reshape([BLOCK_SIZE, BLOCK_D]).permute((1, 0))
                    logits = warpgroup_mma(q, k, no_logits, use_acc=False, is_async=True)
                    v = values.index(before).reshape([BLOCK_SIZE, BLOCK_D])
                    sums = warpgroup_mma(weights, v, acc, is_async=True)
                    logits = warpgroup_mma_wait(1, deps=[logits])
                    member = ((word >> token) & 1) != 0
                    first = 0
                    if EDGE:
                        first = first_key(gl.load(idx_ptr + i), last, BLOCK_SIZE)
                    weights, top, total, shrink = _weigh(
                        logits, top, total, member, first, position, Skv, factor, n, EDGE
                    )
                    weights = gl.convert_layout(weights.to(dtype), WEIGHTS)
                    # Between exponentials and the sums' end: a branch, across which the assembler
                    # moves neither. It would wait first, and nothing would overlap.
                    mbarrier.wait(full.index(next_slot), next_phase, pred=i + 1 < num)
                    acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])
                    mbarrier.arrive(empty.index(before))
                    acc *= gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
                    before = slot
                    taken = i
                else:
                    mbarrier.arrive(empty.index(slot))
                    mbarrier.wait(full.index(next_slot), next_phase, pred=i + 1 < num)
                slot = next_slot
                phase = next_phase
                word = coming
            begin = gl.maximum(begin, num_past)
        v = values.index(before).reshape([BLOCK_SIZE, BLOCK_D])
        sums = warpgroup_mma(weights, v, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[sums])

    real = (token < TILE_TOKENS) & (s < Sq)
    divisor = gl.where(total == 0.0, 1.0, total)
    lse = (top + gl.log2(divisor)) * 0.6931471805599453
    lse = gl.where(total == 0.0, float("-inf"), lse)
    gl.store(lse_ptr + (row % G).to(gl.int64) * Sq + s, lse, mask=real)
    out = acc / gl.convert_layout(divisor, gl.SliceLayout(1, SUMS))[:, None]
    row = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, SUMS))
    s = start + row // G
    mask = ((row // G < TILE_TOKENS) & (s < Sq))[:, None] & (d < D)[None, :]
    out_row = (row % G) * stride_oh + s.to(gl.int64) * stride_os
    gl.store(out_ptr + out_row[:, None] + d[None, :] * stride_od, out.to(dtype), mask=mask)
