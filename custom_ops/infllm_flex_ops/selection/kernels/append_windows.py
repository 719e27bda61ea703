"""Triton kernel of ``append_windows``: new windows of both levels and a row's counters, at once.

A step of generation appends one token, and most steps complete no window: they cost one launch.
The counters therefore move inside the kernel, and a program serves a row with all its KV heads.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.selection.compress_keys import num_windows
from infllm_flex_ops.selection.kernels.compress_keys import Level, average_windows
from infllm_flex_ops.selection.kernels.pool_queries import round_like_float8
from infllm_flex_ops.selection.kernels.rotary_dims import slowest_dim
from infllm_flex_ops.sizes import ceil_div, next_power_of_2
from infllm_flex_ops.triton_common.dependent_launch import dependent_launch, wait_for_previous
from infllm_flex_ops.triton_common.pages import (
    Pages,
    Paging,
    RowPages,
    count_queries,
    entry_offset,
    row_length,
)
from infllm_flex_ops.triton_common.tensor_args import View, view

_WINDOWS = 8


class _Tile(NamedTuple):
    """Compile-time sizes of a program.

    Attributes:
        D: Dims of a window.
        BLOCK_D: The same, padded to a power of two.
        HEAD_DIM: Dims of a key, of which windows have the slowest.
        WINDOWS: Windows at a time.
    """

    D: int
    BLOCK_D: int
    HEAD_DIM: int
    WINDOWS: int


class _Row(NamedTuple):
    """A row of a cache, in a kernel.

    Attributes:
        k: View of the keys, whose pointer is that of the row's first key, or of all pages.
        b: The row.
        start: Slot of the row's first token.
        end: One past the slot of its last token.
        S: Slots of the cache.
        num_new: New slots before ``end``.
        Hkv: KV heads.
        table: Pointer to the row's pages; None for a cache in one piece.
    """

    k: Any
    b: Any
    start: Any
    end: Any
    S: Any
    num_new: Any
    Hkv: Any
    table: Any


@triton.jit
def _write_windows(cache, windows, C, LEVEL: tl.constexpr, TILE: tl.constexpr):
    """Average the windows of a row that end in its new slots, of all KV heads.

    Args:
        cache: The row.
        windows: View of the windows, or of their pages.
        C: Windows that have room.
        LEVEL: The windows.
        TILE: Sizes of the program.
    """
    k, start, end, Hkv = cache.k, cache.start, cache.end, cache.Hkv
    SIZE: tl.constexpr = LEVEL.SIZE
    STRIDE: tl.constexpr = LEVEL.STRIDE
    PAGING: tl.constexpr = LEVEL.PAGING  # Triton 3.6 passes no part of a tuple on as a constant
    written = (tl.maximum(end - start - cache.num_new + (STRIDE - SIZE), 0) // STRIDE).to(tl.int32)
    complete = (tl.maximum(end - start + (STRIDE - SIZE), 0) // STRIDE).to(tl.int32)
    count = (tl.minimum(complete, C) - written) * Hkv
    windows_ptr = windows.ptr
    if cache.table is None:
        windows_ptr += cache.b * windows.b
    # Keys in another dtype are cast before they are averaged, but for e4m3 the average is rounded.
    ROUNDS: tl.constexpr = windows.ptr.dtype.element_ty == tl.float8e4nv
    DTYPE: tl.constexpr = k.ptr.dtype.element_ty if ROUNDS else windows.ptr.dtype.element_ty
    d = tl.arange(0, TILE.BLOCK_D)[None, :].to(tl.int64)
    key_dim = slowest_dim(d, TILE.D, TILE.HEAD_DIM)
    for begin in range(tl.program_id(0) * TILE.WINDOWS, count, tl.num_programs(0) * TILE.WINDOWS):
        i = begin + tl.arange(0, TILE.WINDOWS)
        window = (written + i // Hkv).to(tl.int64)
        head = (i % Hkv)[:, None].to(tl.int64)
        token = start + window * STRIDE
        exists = ((i < count) & (token + SIZE <= cache.S))[:, None]
        mask = exists & (d < TILE.D)
        row = None
        if cache.table is not None:
            row = RowPages(cache.table, exists)
        mean = average_windows(
            View(k.ptr + head * k.h + key_dim * k.d, k.b, k.h, k.s, k.d),
            token,
            mask,
            row,
            DTYPE,
            LEVEL,
            TILE.WINDOWS,
            TILE.BLOCK_D,
        )
        if ROUNDS:
            mean = round_like_float8(mean.to(DTYPE).to(tl.float32))
            mean = mean.to(windows.ptr.dtype.element_ty)
        out_ptr = windows_ptr + head * windows.h
        out_ptr = out_ptr + entry_offset(windows, window[:, None], row, PAGING)
        out_ptr = out_ptr + d * windows.d
        tl.store(out_ptr, mean, mask=mask)


@triton.jit(do_not_specialize=["S", "C", "C2", "num_new", "stride_start", "stride_end"])
def _append_kernel(
    k,
    compressed,
    coarse,
    start_ptr,
    end_ptr,
    old_start_ptr,
    new_start_ptr,
    new_end_ptr,
    stride_start,
    stride_end,
    S,
    C,
    C2,
    num_new,
    Hkv,
    LEVEL: tl.constexpr,
    COARSE_LEVEL: tl.constexpr,
    HAS_COARSE: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_END: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Serve a row. If it reads a counter that it writes, one program serves it."""
    b = tl.program_id(1).to(tl.int64)
    wait_for_previous(OVERLAP)
    if HAS_START:
        start = tl.load(new_start_ptr + b * stride_start).to(tl.int64)
    else:
        start = tl.load(start_ptr + b)
    if HAS_END:
        end = tl.load(new_end_ptr + b * stride_end).to(tl.int64)
    else:
        end = tl.load(end_ptr + b) + num_new
    if HAS_START:
        # A row that begins elsewhere is compressed anew.
        moved = tl.load(old_start_ptr + b) != start
        num_new = tl.where(moved, end - start, num_new)
    tl.debug_barrier()  # every warp has read the counters that one of them now writes
    if tl.program_id(0) == 0:
        tl.store(start_ptr + b, start)
        tl.store(end_ptr + b, end)
    k = View(k.ptr + b * k.b, k.b, k.h, k.s, k.d)
    cache = _Row(k, b, start, end, S, num_new, Hkv, None)
    _write_windows(cache, compressed, C, LEVEL, TILE)
    if HAS_COARSE:
        _write_windows(cache, coarse, C2, COARSE_LEVEL, TILE)


@triton.jit(do_not_specialize=["S", "C", "C2"])
def _append_paged_kernel(
    k,
    compressed,
    coarse,
    pages,
    seq_lens_ptr,
    S,
    C,
    C2,
    Hkv,
    LEVEL: tl.constexpr,
    COARSE_LEVEL: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Serve a row; ``S`` tokens, ``C`` and ``C2`` windows have room in its block table."""
    b = tl.program_id(1).to(tl.int64)
    wait_for_previous(OVERLAP)
    length = row_length(None, seq_lens_ptr, b)
    table = pages.table + b * pages.row
    cache = _Row(k, b, 0, length, S, count_queries(pages, b, length), Hkv, table)
    _write_windows(cache, compressed, C, LEVEL, TILE)
    if coarse is not None:
        _write_windows(cache, coarse, C2, COARSE_LEVEL, TILE)


def _make_tile(head_dim: int, compressed: Tensor) -> _Tile:
    num_dims = compressed.shape[3]
    return _Tile(num_dims, next_power_of_2(num_dims), head_dim, _WINDOWS)


def launch(
    k: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    start: Tensor,
    end: Tensor,
    new_start: Tensor | None,
    new_end: Tensor | None,
    num_new: int,
    kernel_size: int,
    kernel_stride: int,
    coarse_size: int,
    coarse_stride: int,
) -> None:
    """Update the counters and write the completed windows of both levels in one launch."""
    B, Hkv, S, D = k.shape
    if not B:
        return
    programs, old_start = 1, start
    if num_new > kernel_stride:  # more than a step
        programs = ceil_div((num_new // kernel_stride + 1) * Hkv, _WINDOWS)
        new_end = end + num_new if new_end is None else new_end
        old_start = start if new_start is None else start.clone()
    new_start = start if new_start is None else new_start.expand(B)
    has_end = new_end is not None
    new_end = end if new_end is None else new_end.expand(B)
    has_coarse = coarse is not None
    coarse = compressed if coarse is None else coarse
    _append_kernel[(programs, B)](
        k=view(k),
        compressed=view(compressed),
        coarse=view(coarse),
        start_ptr=start,
        end_ptr=end,
        old_start_ptr=old_start,
        new_start_ptr=new_start,
        new_end_ptr=new_end,
        stride_start=new_start.stride(0),
        stride_end=new_end.stride(0),
        S=S,
        C=compressed.shape[2],
        C2=coarse.shape[2],
        num_new=num_new,
        Hkv=Hkv,
        LEVEL=Level(kernel_size, kernel_stride, 0, None),
        COARSE_LEVEL=Level(coarse_size, coarse_stride, 0, None),
        HAS_COARSE=has_coarse,
        HAS_START=new_start is not start,
        HAS_END=has_end,
        TILE=_make_tile(D, compressed),
        num_warps=8,
        **dependent_launch(k),
    )


def launch_paged(
    k: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    max_new: int,
    kernel_size: int,
    kernel_stride: int,
    coarse_size: int,
    coarse_stride: int,
) -> None:
    """Write the completed windows of both levels in one launch."""
    _, Hkv, page_size, D = k.shape
    B, max_pages = block_table.shape
    if not B or not max_new:
        return
    room = max_pages * page_size
    sizes = (kernel_size, kernel_stride), (coarse_size, coarse_stride)
    level, coarse_level = (
        Level(size, stride, page_size, Paging.of_windows(page_size, size, stride))
        for size, stride in sizes
    )
    _append_paged_kernel[(ceil_div((max_new // kernel_stride + 1) * Hkv, _WINDOWS), B)](
        k=view(k),
        compressed=view(compressed),
        coarse=None if coarse is None else view(coarse),
        pages=Pages(block_table, block_table.stride(0), query_start),
        seq_lens_ptr=seq_lens,
        S=room,
        C=num_windows(room, kernel_size, kernel_stride),
        C2=num_windows(room, coarse_size, coarse_stride),
        Hkv=Hkv,
        LEVEL=level,
        COARSE_LEVEL=coarse_level,
        TILE=_make_tile(D, compressed),
        num_warps=8,
        **dependent_launch(k),
    )
