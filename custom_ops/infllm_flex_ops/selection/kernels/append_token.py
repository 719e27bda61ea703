"""Append one token per row inside the first kernel of a decode step.

A token completes at most one window of each level. The kernel computes what ``append_windows``
does for one new slot, without a launch of its own.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.compress_keys import Level, average_windows
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.triton_common.pages import view_keys
from infllm_flex_ops.triton_common.tensor_args import View


class Appended(NamedTuple):
    """The one token per row that a decode step appends, in a kernel.

    Attributes:
        k: View of the cache of keys, which holds the token.
        new_start: New value of ``start``, of any integer dtype; unused without ``HAS_START``.
        new_start_b: Stride of its rows.
        new_end: New value of ``end``, likewise; unused without ``HAS_END``.
        new_end_b: Stride of its rows.
        next_end: Where the grown ``end`` goes, int64 ``[B]``, while programs read the old one;
            unused with ``HAS_END``.
    """

    k: Any
    new_start: Any
    new_start_b: int
    new_end: Any
    new_end_b: int
    next_end: Any


class AppendedKind(NamedTuple):
    """Kind of an appended token, at compile time.

    Attributes:
        LEVEL: Windows of the compressed keys.
        COARSE_LEVEL: Those of the coarse keys; None if there are none.
        HAS_START: Whether ``start`` gets a new value.
        HAS_END: Whether ``end`` gets a new value; otherwise it grows by one.
    """

    LEVEL: Level
    COARSE_LEVEL: Level | None
    HAS_START: bool
    HAS_END: bool

    @classmethod
    def of(
        cls, rule: SelectionRule, has_coarse: bool, has_start: bool, has_end: bool
    ) -> "AppendedKind":
        """Kind for a cache in one piece."""
        coarse = Level(*rule.coarse_windows, 0, None) if has_coarse else None
        return cls(Level(*rule.windows, 0, None), coarse, has_start, has_end)


@triton.jit
def appended_bounds(appended, start_ptr, end_ptr, b, KIND: tl.constexpr):
    """Slot of a row's first token, and the one behind its last, which is the appended one."""
    if KIND.HAS_START:
        start = tl.load(appended.new_start + b * appended.new_start_b).to(tl.int64)
    else:
        start = tl.load(start_ptr + b)
    if KIND.HAS_END:
        end = tl.load(appended.new_end + b * appended.new_end_b).to(tl.int64)
    else:
        end = tl.load(end_ptr + b) + 1
    return start, end


@triton.jit
def store_bounds(appended, start, end, start_ptr, end_ptr, b, KIND: tl.constexpr):
    """Store where a row begins and ends, for the kernels after this one.

    Other programs of this launch read the old ``end`` to add one to it, so that it must stay.
    """
    if KIND.HAS_START:
        tl.store(start_ptr + b, start)
    if KIND.HAS_END:
        tl.store(end_ptr + b, end)
    else:
        tl.store(appended.next_end + b, end)


@triton.jit
def append_token(
    k,
    compressed,
    coarse,
    start,
    end,
    b,
    h,
    S,
    C,
    C2,
    KIND: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the windows of one KV head that a row's new last token completes.

    The calling program may read them afterwards.

    Args:
        k: View of the cache of keys.
        compressed: View of the compressed keys.
        coarse: View of the coarse keys.
        start: Slot of the row's first token.
        end: One past the slot of its last one.
        b: The row, int64.
        h: The KV head, int64.
        S: Slots of the cache.
        C: Compressed keys that have room.
        C2: Coarse keys that have room.
        KIND: Kind of the token.
        D: Head dim.
        BLOCK_D: The head dim, padded to a power of two.
    """
    keys = view_keys(k, None, b, h)
    LEVEL: tl.constexpr = KIND.LEVEL
    _write_window(keys, view_keys(compressed, None, b, h), start, end, S, C, LEVEL, D, BLOCK_D)
    if KIND.COARSE_LEVEL is not None:
        COARSE: tl.constexpr = KIND.COARSE_LEVEL
        _write_window(keys, view_keys(coarse, None, b, h), start, end, S, C2, COARSE, D, BLOCK_D)
    tl.debug_barrier()


@triton.jit
def _write_window(
    keys,
    windows,
    start,
    end,
    S,
    C,
    LEVEL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Average the window that ends with the row's last token, if there is one."""
    SIZE: tl.constexpr = LEVEL.SIZE
    STRIDE: tl.constexpr = LEVEL.STRIDE
    before = end - start - SIZE
    if (before >= 0) & (before % STRIDE == 0):
        window = before // STRIDE
        d = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
        mask = (window < C) & (end <= S) & (d < D)
        mean = average_windows(
            View(keys.ptr + d * keys.d, keys.b, keys.h, keys.s, keys.d),
            end - SIZE + tl.zeros([1], tl.int64),
            mask,
            None,
            windows.ptr.dtype.element_ty,
            LEVEL,
            1,
            BLOCK_D,
        )
        tl.store(windows.ptr + window * windows.s + d * windows.d, mean, mask=mask)
