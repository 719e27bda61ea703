"""Kernel arguments grouped by what they belong to, such as a tensor and its strides.

Triton takes a NamedTuple as one argument, compiles and launches it member by member, and kernels
read the members by name. The limits:

* ``do_not_specialize`` names whole parameters. Inside a tuple it has no effect: every integer is
  specialised (1, multiples of 16). Keep integers that vary from call to call, such as lengths and
  counts, as parameters of their own, or the kernel is compiled again for them.
* Tensor descriptors (TMA) stay parameters of their own: the launcher expands none inside a tuple.
* No member may be named ``values`` or ``type``: tuples in a kernel have these themselves.
* The members of a NamedTuple passed as ``tl.constexpr`` are plain numbers in the kernel. Functions
  of Triton's builtin language take them; a list of them is refused by ``tl.zeros``, which is itself
  a kernel function: write ``tl.full([TILE.ROWS], 0.0, tl.float32)``. A member may be a NamedTuple
  of its own; bind it to a name, ``RULE: tl.constexpr = SIZES.RULE``, before its numbers are passed
  on, since Triton 3.6 takes no plain number for an argument.
"""

from typing import Any, NamedTuple

from torch import Tensor


class View(NamedTuple):
    """A tensor ``[B, H, S, D]`` in a kernel.

    Attributes:
        ptr: The tensor at launch; in the kernel a pointer, or pointers derived from it.
        b: Stride of the batch.
        h: Stride of the heads.
        s: Stride of the tokens.
        d: Stride of the last dimension.
    """

    ptr: Any
    b: int
    h: int
    s: int
    d: int


class RowTensor(NamedTuple):
    """Some rows of a tensor, or rows as columns: values, and pointers that float32 is read from.

    Attributes:
        loaded: The values; unused in float32, whose rows are loaded a few elements at a time, and
            None where only the pointers are passed.
        ptr: Pointers to the rows, with an axis of 1 for the elements.
        mask: Whether each row exists, in the shape of ``ptr``.
        d: Stride of the last dimension.
    """

    loaded: Any
    ptr: Any
    mask: Any
    d: Any


class Lists(NamedTuple):
    """The blocks that each tile of tokens attends to, ``[B, Hkv, num_tiles, width]``, contiguous.

    Attributes:
        num: Blocks per tile, int32 ``[B, Hkv, num_tiles]``.
        idx: The blocks, ascending, int32.
        membership: One bit per token of the tile: set if the token selected the block. None if a
            tile is one token.
        width: Slots of a list.
    """

    num: Any
    idx: Any
    membership: Any
    width: int


class Softmax(NamedTuple):
    """A running softmax over keys, in a kernel: weighted values, maximum and sum of each row.

    A loop carries the members in this order, and ptxas may spill in another one.
    """

    acc: Any
    m_i: Any
    l_i: Any


def view(x: Tensor) -> View:
    """Group a tensor ``[B, H, S, D]`` and its strides."""
    return View(x, *x.stride())
