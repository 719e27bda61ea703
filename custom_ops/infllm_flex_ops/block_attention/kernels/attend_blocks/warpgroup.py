"""The rows of one warpgroup, 64 of a tile's, on Hopper."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from infllm_flex_ops.block_attention.kernels.attend_blocks.smem_pipeline import advance, first_key
from infllm_flex_ops.triton_common.constants import LN2

ROWS = gl.constexpr(64)  # of one warpgroup's matrix instruction


class HeadView(NamedTuple):
    """A tensor ``[G, S, D]`` of the query heads of one KV head, in a kernel."""

    ptr: Any
    h: Any
    s: Any
    d: Any


class Group(NamedTuple):
    """Inputs that all warpgroups of a program read, in a kernel.

    Attributes:
        q: The queries.
        idx_ptr: Pointer to the blocks of the tile's list.
        membership_ptr: Pointer to their membership bits.
        width: Slots of the list.
        out: The output.
        lse_ptr: Pointer to the log-sum-exp of the query heads, ``[G, Sq]``.
        start: First token of the tile.
        num: Blocks in the list.
        num_past: The first of them, all of whose keys lie before the tile's first token.
        last: Last block of the sequence.
        Sq: Queries.
        Skv: Keys.
        qk_scale_log2: Factor on the dot products, times log2 e.
    """

    q: Any
    idx_ptr: Any
    membership_ptr: Any
    width: Any
    out: Any
    lse_ptr: Any
    start: Any
    num: Any
    num_past: Any
    last: Any
    Sq: Any
    Skv: Any
    qk_scale_log2: Any


@gluon.jit
def _add_logits(logits, m_i, l_i, member, key, position, Skv, qk_scale_log2, EDGE: gl.constexpr):
    """Add a block's logits to the running softmax of the rows that selected it."""
    if EDGE:
        seen = (key < Skv)[None, :] & (key[None, :] <= position[:, None])
        logits = gl.where(seen, logits, float("-inf"))
    m_new = gl.maximum(m_i, gl.where(member, gl.max(logits, 1) * qk_scale_log2, float("-inf")))
    m_safe = gl.where(member, m_new, float("inf"))
    weights = gl.exp2(logits * qk_scale_log2 - m_safe[:, None])
    alpha = gl.exp2(m_i - m_new)
    return weights, m_new, l_i * alpha + gl.sum(weights, 1), alpha


@gluon.jit
def _load_queries(
    GROUP: gl.constexpr, group, queries, SHAPE: gl.constexpr, TILE: gl.constexpr, DOT: gl.constexpr
):
    """Load a warpgroup's rows, to registers or ``queries``; rows that do not exist are zero."""
    BLOCK_D: gl.constexpr = TILE.BLOCK_D
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    row = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LOADED))
    d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LOADED))
    s = group.start + row // SHAPE.G
    exists = (row // SHAPE.G < SHAPE.TILE_TOKENS) & (s < group.Sq)
    mask = exists[:, None] & (d < SHAPE.D)[None, :]
    q_row = (row % SHAPE.G) * group.q.h + s.to(gl.int64) * group.q.s
    q = gl.load(group.q.ptr + q_row[:, None] + d[None, :] * group.q.d, mask=mask, other=0.0)
    if TILE.GROUPS == 2:
        q = gl.convert_layout(q, DOT)
    else:
        queries.index(GROUP).store(q)
        fence_async_shared()
        q = queries.index(GROUP)
    return q


@gluon.jit
def _read_word(group, i, FIRST_TOKEN: gl.constexpr, TOKENS: gl.constexpr):
    """Read the membership bits of a listed block, of the tokens that have a row in the group."""
    at = FIRST_TOKEN // 64 * group.width + i
    bits = gl.load(group.membership_ptr + at, mask=group.num > 0, other=0) >> FIRST_TOKEN % 64
    if TOKENS <= 32:
        bits = bits.to(gl.int32)
    if TOKENS < 32:
        bits &= (1 << TOKENS) - 1
    return bits


@gluon.jit
def attend_rows(
    GROUP: gl.constexpr, pipeline, group, queries, SHAPE: gl.constexpr, TILE: gl.constexpr
):
    """Attend with 64 rows of a tile to the blocks that a token of theirs selected."""
    BLOCK_D: gl.constexpr = TILE.BLOCK_D
    BLOCK_SIZE: gl.constexpr = SHAPE.BLOCK_SIZE
    SLOTS: gl.constexpr = TILE.SLOTS
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_SIZE, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    keys, values, full, empty = pipeline
    num, num_past, last = group.num, group.num_past, group.last
    Sq, Skv, qk_scale_log2 = group.Sq, group.Skv, group.qk_scale_log2
    dtype: gl.constexpr = group.q.ptr.dtype.element_ty

    q = _load_queries(GROUP, group, queries, SHAPE, TILE, gl.DotOperandLayout(0, LOGITS, 2))

    row = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
    n = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, LOGITS))
    # The tokens that have a row here.
    FIRST_TOKEN: gl.constexpr = GROUP * ROWS // SHAPE.G
    TOKENS: gl.constexpr = (GROUP * ROWS + ROWS - 1) // SHAPE.G - FIRST_TOKEN + 1
    token = row // SHAPE.G - FIRST_TOKEN
    position = Skv - Sq + group.start + row // SHAPE.G
    no_logits = gl.zeros([ROWS, BLOCK_SIZE], gl.float32, LOGITS)
    m_i = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, LOGITS))
    l_i = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS))
    acc = gl.zeros([ROWS, BLOCK_D], gl.float32, SUMS)

    i = 0
    slot = 0
    phase = 0
    bits = _read_word(group, 0, FIRST_TOKEN, TOKENS)
    while (i < num) & (bits == 0):
        mbarrier.wait(full.index(slot), phase)
        mbarrier.arrive(empty.index(slot))
        i += 1
        slot, phase = advance(slot, phase, SLOTS)
        bits = _read_word(group, gl.minimum(i, num - 1), FIRST_TOKEN, TOKENS)
    if i < num:
        mbarrier.wait(full.index(slot), phase)
        k = keys.index(slot).reshape([BLOCK_SIZE, BLOCK_D]).permute((1, 0))
        logits = warpgroup_mma(q, k, no_logits, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(0, deps=[logits])
        member = ((bits >> token) & 1) != 0
        first = first_key(gl.load(group.idx_ptr + i), last, BLOCK_SIZE)
        weights, m_i, l_i, alpha = _add_logits(
            logits, m_i, l_i, member, first + n, position, Skv, qk_scale_log2, EDGE=True
        )
        # From here on, the values of a block are summed while the next block's softmax is taken.
        weights = gl.convert_layout(weights.to(dtype), WEIGHTS)
        before = slot
        taken = i
        begin = i + 1
        slot, phase = advance(slot, phase, SLOTS)
        mbarrier.wait(full.index(slot), phase, pred=begin < num)
        bits = _read_word(group, gl.minimum(begin, num - 1), FIRST_TOKEN, TOKENS)
        for EDGE in gl.static_range(2):
            for i in range(begin, num if EDGE else num_past):
                next_bits = _read_word(group, gl.minimum(i + 1, num - 1), FIRST_TOKEN, TOKENS)
                next_slot, next_phase = advance(slot, phase, SLOTS)
                chosen = bits != 0
                # The previous slot is held until the next block is taken, so take one before the
                # pipeline runs out of slots. A block that no row selected changes no bit.
                if chosen | (i - taken >= SLOTS - 2):
                    k = keys.index(slot).reshape([BLOCK_SIZE, BLOCK_D]).permute((1, 0))
                    logits = warpgroup_mma(q, k, no_logits, use_acc=False, is_async=True)
                    v = values.index(before).reshape([BLOCK_SIZE, BLOCK_D])
                    sums = warpgroup_mma(weights, v, acc, is_async=True)
                    logits = warpgroup_mma_wait(1, deps=[logits])
                    member = ((bits >> token) & 1) != 0
                    first = 0
                    if EDGE:
                        first = first_key(gl.load(group.idx_ptr + i), last, BLOCK_SIZE)
                    weights, m_i, l_i, alpha = _add_logits(
                        logits, m_i, l_i, member, first + n, position, Skv, qk_scale_log2, EDGE
                    )
                    weights = gl.convert_layout(weights.to(dtype), WEIGHTS)
                    # This wait is a branch, across which the assembler moves neither the
                    # exponentials nor the end of the sums. Without it they would not overlap.
                    mbarrier.wait(full.index(next_slot), next_phase, pred=i + 1 < num)
                    acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])
                    mbarrier.arrive(empty.index(before))
                    acc *= gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None]
                    before = slot
                    taken = i
                else:
                    mbarrier.arrive(empty.index(slot))
                    mbarrier.wait(full.index(next_slot), next_phase, pred=i + 1 < num)
                slot = next_slot
                phase = next_phase
                bits = next_bits
            begin = gl.maximum(begin, num_past)
        v = values.index(before).reshape([BLOCK_SIZE, BLOCK_D])
        sums = warpgroup_mma(weights, v, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[sums])

    _store_rows(GROUP, group, m_i, l_i, acc, dtype, SHAPE, BLOCK_D)


@gluon.jit
def _store_rows(
    GROUP: gl.constexpr,
    group,
    m_i,
    l_i,
    acc,
    dtype: gl.constexpr,
    SHAPE: gl.constexpr,
    BLOCK_D: gl.constexpr,
):
    """Write the output of a warpgroup's rows and their log-sum-exp."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SHAPE.BLOCK_SIZE, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    row = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
    s = group.start + row // SHAPE.G
    exists = (row // SHAPE.G < SHAPE.TILE_TOKENS) & (s < group.Sq)
    l_safe = gl.where(l_i == 0.0, 1.0, l_i)
    lse = (m_i + gl.log2(l_safe)) * LN2
    lse = gl.where(l_i == 0.0, float("-inf"), lse)
    gl.store(group.lse_ptr + (row % SHAPE.G).to(gl.int64) * group.Sq + s, lse, mask=exists)
    out = acc / gl.convert_layout(l_safe, gl.SliceLayout(1, SUMS))[:, None]
    row = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, SUMS))
    s = group.start + row // SHAPE.G
    exists = (row // SHAPE.G < SHAPE.TILE_TOKENS) & (s < group.Sq)
    mask = exists[:, None] & (d < SHAPE.D)[None, :]
    out_row = (row % SHAPE.G) * group.out.h + s.to(gl.int64) * group.out.s
    out_ptr = group.out.ptr + out_row[:, None] + d[None, :] * group.out.d
    gl.store(out_ptr, out.to(dtype), mask=mask)
