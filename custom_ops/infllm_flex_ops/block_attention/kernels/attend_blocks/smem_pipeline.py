"""The pipeline in shared memory through which blocks of keys and values pass, and its producer.

Each slot has two barriers: ``full`` when a block has arrived, ``empty`` when all consumer groups
have released it. The phase of both flips with every round of the pipeline.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


class Pipeline(NamedTuple):
    """Slots of shared memory for blocks of keys and values, and the barriers of each slot."""

    k: Any
    v: Any
    full: Any
    empty: Any


class KeyPlace(NamedTuple):
    """Where the keys and values of one KV head lie, as the descriptors see them, in a kernel.

    Attributes:
        b: Batch row.
        h: KV head.
        last: Last block of the sequence.
        table: Pointer to the pages of the sequence; None for keys in one piece.
        PAGE: Keys of a page.
    """

    b: Any
    h: Any
    last: Any
    table: Any
    PAGE: Any


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
    """Return the first key of a listed block; clamped, so that no corrupt list reads elsewhere."""
    return gl.minimum(gl.maximum(block, 0), last) * BLOCK_SIZE


@gluon.jit
def fetch(
    pipeline,
    k_desc,
    v_desc,
    idx_ptr,
    num,
    place,
    BLOCK_SIZE: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Load the listed blocks, each as soon as all consumer groups have released its slot."""
    keys, values, full, empty = pipeline
    BYTES: gl.constexpr = 2 * BLOCK_SIZE * keys.shape[4] * keys.dtype.primitive_bitwidth // 8
    slot = 0
    phase = 1  # empty at first
    block = gl.load(idx_ptr, mask=num > 0, other=0)
    for i in range(num):
        first = first_key(block, place.last, BLOCK_SIZE)
        block = gl.load(idx_ptr + gl.minimum(i + 1, num - 1))
        page = place.b
        if place.table is not None:
            page = gl.load(place.table + first // place.PAGE)
            first = first % place.PAGE
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), BYTES)
        at = [page, place.h, first, 0]
        tma.async_copy_global_to_shared(k_desc, at, full.index(slot), keys.index(slot))
        tma.async_copy_global_to_shared(v_desc, at, full.index(slot), values.index(slot))
        slot, phase = advance(slot, phase, SLOTS)
