"""Attention of tiles to their lists on Hopper, where one warp fetches what the others multiply.

The rows, the arithmetic and the bits of ``forward.py``, divided among warps (warp specialization):
a warp has the copy engine bring the blocks of a tile's list into a ring of shared memory, and two
warpgroups, of 64 rows each, take from it the blocks that a token of theirs has chosen. The loads
are a whole tile's, the products those of half a tile, and while one group takes exponentials the
other keeps the tensor cores busy. Triton's compiler does not divide this loop on Hopper; Gluon, the
language below it that comes with Triton, lets a kernel say who does what.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from infllm_flex_ops.block_attention.kernels.attend_blocks.ring import fetch
from infllm_flex_ops.block_attention.kernels.attend_blocks.warpgroup import attend_rows


@gluon.jit(do_not_specialize=["Sq", "Skv", "num_tiles"])
def attend_specialized_kernel(
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
    G: gl.constexpr,
    D: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TILE_TOKENS: gl.constexpr,
    k_boxes,
    v_boxes,
    BLOCK_D: gl.constexpr,
    SLOTS: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr,
    FETCH_REGISTERS: gl.constexpr,
):
    """Attend with one tile, of one KV head; the arguments of ``attend_kernel``."""
    tile = num_tiles - 1 - gl.program_id(0) % num_tiles  # the longest lists first
    head = gl.program_id(0) // num_tiles
    b = head // Hkv
    h = head % Hkv
    lists = head.to(gl.int64) * num_tiles + tile
    num = gl.minimum(gl.load(num_ptr + lists), width)
    # So many blocks hold the tile's tokens at most, and lists ascend: the others are all past.
    EDGES: gl.constexpr = (TILE_TOKENS + BLOCK_SIZE - 2) // BLOCK_SIZE + 1
    num_past = gl.maximum(num - EDGES, 0)
    if Skv < BLOCK_SIZE:
        num_past = 0
    last = (Skv - 1) // BLOCK_SIZE

    dtype: gl.constexpr = k_boxes.dtype
    BOX: gl.constexpr = [SLOTS, 1, 1, BLOCK_SIZE, BLOCK_D]
    keys = gl.allocate_shared_memory(dtype, BOX, k_boxes.layout)
    values = gl.allocate_shared_memory(dtype, BOX, v_boxes.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()

    ring = (keys, values, full, empty)
    q_head = (h * G).to(gl.int64)
    b64 = b.to(gl.int64)
    pointers = (
        q_ptr + b64 * stride_qb + q_head * stride_qh,
        idx_ptr + lists * width,
        words_ptr + lists * width,
        out_ptr + b64 * stride_ob + q_head * stride_oh,
        lse_ptr + head.to(gl.int64) * G * Sq,
    )
    strides = (stride_qh, stride_qs, stride_qd, stride_oh, stride_os, stride_od)
    lengths = (tile * TILE_TOKENS, num, num_past, last, Sq, Skv, factor)
    inputs = (ring, pointers, strides, lengths)
    gl.warp_specialize(
        [
            (attend_rows, (0, inputs, G, D, BLOCK_SIZE, TILE_TOKENS, BLOCK_D, SLOTS)),
            (attend_rows, (1, inputs, G, D, BLOCK_SIZE, TILE_TOKENS, BLOCK_D, SLOTS)),
            (fetch, (ring, k_boxes, v_boxes, pointers[1], num, b, h, last, BLOCK_SIZE, SLOTS)),
        ],
        [4, 1],
        [GROUP_REGISTERS, FETCH_REGISTERS],
    )
