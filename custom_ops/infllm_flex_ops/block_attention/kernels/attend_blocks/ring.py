"""The ring of shared memory through which blocks of keys and values pass, and who fills it.

Of each slot two barriers tell: ``full``, that a block has come, and ``empty``, that both groups
have left it. Both turn with every round of the ring.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def advance(slot, phase, SLOTS: gl.constexpr):
    """Step to the next slot and the phase of its barriers."""
    slot += 1
    if slot == SLOTS:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def first_key(block, last, BLOCK_SIZE: gl.constexpr):
    """Say where a listed block begins: no number, however wrong, leads out of the tensors."""
    return gl.minimum(gl.maximum(block, 0), last) * BLOCK_SIZE


@gluon.jit
def fetch(
    ring,
    k_boxes,
    v_boxes,
    idx_ptr,
    num,
    b,
    h,
    last,
    BLOCK_SIZE: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Bring the listed blocks into the ring, each as soon as both groups have left its slot."""
    keys, values, full, empty = ring
    BYTES: gl.constexpr = 2 * BLOCK_SIZE * keys.shape[4] * keys.dtype.primitive_bitwidth // 8
    slot = 0
    phase = 1  # empty at first
    block = gl.load(idx_ptr, mask=num > 0, other=0)
    for i in range(num):
        first = first_key(block, last, BLOCK_SIZE)
        block = gl.load(idx_ptr + gl.minimum(i + 1, num - 1))
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), BYTES)
        at = [b, h, first, 0]
        tma.async_copy_global_to_shared(k_boxes, at, full.index(slot), keys.index(slot))
        tma.async_copy_global_to_shared(v_boxes, at, full.index(slot), values.index(slot))
        slot, phase = advance(slot, phase, SLOTS)
