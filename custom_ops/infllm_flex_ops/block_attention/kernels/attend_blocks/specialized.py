"""Attention of tiles to their lists on Hopper by specialised warps: one loads, the others compute.

The rows, the arithmetic and the bits are those of ``forward.py``. One warp has the copy engine load
the blocks of a tile's list into a pipeline in shared memory. Two or three warpgroups of 64 rows
each take from it the blocks that a token of theirs selected. A whole tile shares the loads, a group
the products, and while one group takes exponentials the others keep the tensor cores busy. Triton's
compiler does not specialise the warps of this loop on Hopper, so it is written in Gluon.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from infllm_flex_ops.block_attention.kernels.attend_blocks.smem_pipeline import (
    KeyPlace,
    Pipeline,
    fetch,
)
from infllm_flex_ops.block_attention.kernels.attend_blocks.warpgroup import (
    ROWS,
    Group,
    HeadView,
    attend_rows,
)


class SpecializedTile(NamedTuple):
    """Compile-time sizes of a program.

    Attributes:
        BLOCK_D: The head dim, padded to a power of two.
        GROUPS: Warpgroups that compute, two or three. Three keep their queries in shared memory.
        SLOTS: Blocks of keys and values that the pipeline holds.
        GROUP_REGISTERS: Registers of a thread that computes.
        FETCH_REGISTERS: Registers of a thread that loads.
    """

    BLOCK_D: int
    GROUPS: int
    SLOTS: int
    GROUP_REGISTERS: int
    FETCH_REGISTERS: int


@gluon.jit(do_not_specialize=["Sq", "Skv", "num_tiles"])
def attend_specialized_kernel(
    q,
    k_desc,
    v_desc,
    lists,
    out,
    lse_ptr,
    Sq,
    Skv,
    num_tiles,
    qk_scale_log2,
    Hkv,
    table,
    SHAPE: gl.constexpr,
    TILE: gl.constexpr,
):
    """Attend with one tile, of one KV head; the arguments are those of ``attend_kernel``."""
    BLOCK_SIZE: gl.constexpr = SHAPE.BLOCK_SIZE
    TILE_TOKENS: gl.constexpr = SHAPE.TILE_TOKENS
    WORDS: gl.constexpr = (TILE_TOKENS + 63) // 64
    SLOTS: gl.constexpr = TILE.SLOTS
    tile = num_tiles - 1 - gl.program_id(0) % num_tiles  # the longest lists first
    head = gl.program_id(0) // num_tiles
    b = head // Hkv
    h = head % Hkv
    start = head.to(gl.int64) * num_tiles + tile
    num = gl.minimum(gl.load(lists.num + start), lists.width)
    # The tile's own tokens span at most EDGES blocks. Lists are ascending, so every earlier entry
    # lies entirely in the past and needs no causal test.
    EDGES: gl.constexpr = (TILE_TOKENS + BLOCK_SIZE - 2) // BLOCK_SIZE + 1
    num_past = gl.maximum(num - EDGES, 0)
    if Skv < BLOCK_SIZE:
        num_past = 0
    last = (Skv - 1) // BLOCK_SIZE

    dtype: gl.constexpr = k_desc.dtype
    BOX: gl.constexpr = [SLOTS, 1, 1, BLOCK_SIZE, TILE.BLOCK_D]
    keys = gl.allocate_shared_memory(dtype, BOX, k_desc.layout)
    values = gl.allocate_shared_memory(dtype, BOX, v_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=TILE.GROUPS)
    fence_async_shared()
    queries = keys  # unused by two groups
    if TILE.GROUPS > 2:
        ROWS_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for(
            [ROWS, TILE.BLOCK_D], dtype
        )
        queries = gl.allocate_shared_memory(dtype, [TILE.GROUPS, ROWS, TILE.BLOCK_D], ROWS_SHARED)

    pipeline = Pipeline(keys, values, full, empty)
    q_head = (h * SHAPE.G).to(gl.int64)
    b64 = b.to(gl.int64)
    group = Group(
        q=HeadView(q.ptr + b64 * q.b + q_head * q.h, q.h, q.s, q.d),
        idx_ptr=lists.idx + start * lists.width,
        membership_ptr=lists.membership + start * lists.width * WORDS,
        width=lists.width,
        out=HeadView(out.ptr + b64 * out.b + q_head * out.h, out.h, out.s, out.d),
        lse_ptr=lse_ptr + head.to(gl.int64) * SHAPE.G * Sq,
        start=tile * TILE_TOKENS,
        num=num,
        num_past=num_past,
        last=last,
        Sq=Sq,
        Skv=Skv,
        qk_scale_log2=qk_scale_log2,
    )
    place = KeyPlace(b, h, last, table, SHAPE.PAGE)
    if TILE.GROUPS > 2:
        gl.warp_specialize(
            [
                (attend_rows, (0, pipeline, group, queries, SHAPE, TILE)),
                (attend_rows, (1, pipeline, group, queries, SHAPE, TILE)),
                (attend_rows, (2, pipeline, group, queries, SHAPE, TILE)),
                (fetch, (pipeline, k_desc, v_desc, group.idx_ptr, num, place, BLOCK_SIZE, SLOTS)),
            ],
            [4, 4, 1],
            [TILE.GROUP_REGISTERS, TILE.GROUP_REGISTERS, TILE.FETCH_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (attend_rows, (0, pipeline, group, queries, SHAPE, TILE)),
                (attend_rows, (1, pipeline, group, queries, SHAPE, TILE)),
                (fetch, (pipeline, k_desc, v_desc, group.idx_ptr, num, place, BLOCK_SIZE, SLOTS)),
            ],
            [4, 1],
            [TILE.GROUP_REGISTERS, TILE.FETCH_REGISTERS],
        )
