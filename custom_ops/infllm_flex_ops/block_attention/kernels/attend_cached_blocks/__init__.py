"""Triton kernels of ``attend_cached_blocks``: a query's list split among programs, then joined."""

import math

import torch
from torch import Tensor

from infllm_flex_ops.block_attention.kernels.attend_cached_blocks.join import join_kernel
from infllm_flex_ops.block_attention.kernels.attend_cached_blocks.split import (
    Shape,
    Tile,
    split_kernel,
)
from infllm_flex_ops.device import count_multiprocessors, has_little_shared_memory
from infllm_flex_ops.sizes import ceil_div, group_size, next_power_of_2
from infllm_flex_ops.triton_common.dependent_launch import dependent_launch, single_launch
from infllm_flex_ops.triton_common.pages import CachedRows
from infllm_flex_ops.triton_common.tensor_args import view

_PROGRAMS = 3  # per multiprocessor: three fit on Hopper, and more would make a second wave
_PROGRAMS_OF_A_SLOT = 4  # per multiprocessor, of one slot each: they take half the shared memory
_MAX_SPLITS = 128  # per list; the joining kernel reads all of them at once
_SLOTS = 128  # that a program looks up at once; up to 32 stay within a warp
_PART = 32  # elements of a value that one joining program takes


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    start: Tensor,
    end: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    """Attend to a few slots of a list per program; join the parts by their log-sum-exp."""
    B, Hq, n, D = q.shape
    out = torch.empty(B, Hq, n, D, dtype=q.dtype, device=q.device)
    rows = CachedRows.in_one_piece(q, start, end)
    _attend(q, k, v, selected, out, rows, k.shape[2], block_size, scale)
    return out


def launch_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    block_size: int,
    max_queries: int,
    scale: float,
) -> Tensor:
    """Do the same for ragged queries over pages."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = CachedRows.in_pages(
        q, block_table, seq_lens, query_start, max_queries, page_size=k.shape[2]
    )
    capacity = block_table.shape[1] * k.shape[2]
    _attend(q, k, v, selected[None], out, rows, capacity, block_size, scale)
    return out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    out: Tensor,
    rows: CachedRows,
    capacity: int,
    block_size: int,
    scale: float,
) -> None:
    """Fill ``out`` in two launches; no row has room for more than ``capacity`` tokens."""
    Hkv, D = k.shape[1], q.shape[-1]
    if out.numel() == 0 or rows.n == 0:
        return
    n, lists = rows.n, rows.B * Hkv * rows.n
    slots, splits = _split(selected, lists)
    shape = Shape(group_size(q.shape[1], k.shape[1]), D, block_size, rows.page_size)
    tile, options = _choose_tile(q, k, v, shape)
    is_single = slots == 1 and block_size <= tile.BLOCK_N
    if is_single:
        options = {**options, "num_stages": 1}
    elif rows.page_size % block_size:  # the pages of a block's keys are looked up step by step
        options = rows.pipeline(options)
    overlap = dependent_launch(q)
    parts = torch.empty(
        lists, splits, tile.ROWS, tile.BLOCK_D + 2, dtype=torch.float32, device=q.device
    )
    split_kernel[(splits, n, rows.B * Hkv)](
        q=rows.q,
        k=view(k),
        v=view(v),
        selected=view(selected),
        pages=rows.pages,
        start_ptr=rows.start,
        end_ptr=rows.end,
        parts_ptr=parts,
        n=n,
        S=capacity,
        W=selected.shape[-1],
        slots=slots,
        qk_scale_log2=scale * math.log2(math.e),
        Hkv=Hkv,
        SHAPE=shape,
        TILE=tile,
        SLOTS=min(_SLOTS, next_power_of_2(slots)),
        MORE=slots > _SLOTS,
        SINGLE=is_single,
        **options,
        **overlap,
    )
    part = min(_PART, tile.BLOCK_D)
    join_kernel[(shape.G * ceil_div(D, part), n, rows.B * Hkv)](
        parts_ptr=parts,
        out_ptr=out,
        pages=rows.pages,
        n=n,
        splits=splits,
        Hkv=None if rows.pages is None else Hkv,
        G=shape.G,
        D=D,
        ROWS=tile.ROWS,
        BLOCK_D=tile.BLOCK_D,
        PART=part,
        SPLITS=next_power_of_2(splits),
        num_warps=4,
        # Where programs take many blocks, joining programs that wait would slow them.
        **(overlap if is_single else single_launch()),
    )


def _split(selected: Tensor, num_lists: int) -> tuple[int, int]:
    """Choose the slots per program and the programs per list."""
    width = selected.shape[-1]
    multiprocessors = count_multiprocessors(selected.device)
    programs = _PROGRAMS * multiprocessors
    if num_lists * width <= _PROGRAMS_OF_A_SLOT * multiprocessors:
        programs = num_lists * width
    wanted = max(1, min(_MAX_SPLITS, programs // num_lists))
    slots = max(1, ceil_div(width, wanted))
    return slots, max(1, ceil_div(width, slots))


def _choose_tile(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> tuple[Tile, dict[str, int]]:
    """Choose the sizes of a program, and Triton's options."""
    is_half = q.element_size() == 2
    is_wide = max(x.element_size() for x in (q, k, v)) > 2  # a cache may be wider than queries
    rows = max(16, next_power_of_2(shape.G))
    block_d = max(16, next_power_of_2(shape.D))
    block_n = max(16, min(32 if is_wide else 64, next_power_of_2(shape.BLOCK_SIZE)))
    # Wide heads of a cache that is cast as it is read take more registers.
    many_warps = rows > 32 or (is_wide and is_half and block_d > 128)
    options = {
        "num_warps": 8 if many_warps else 4,
        "num_stages": 1 if is_wide else _num_stages(q, block_d),
    }
    return Tile(rows, block_n, block_d, q.element_size() > 2), options


def _num_stages(q: Tensor, block_d: int) -> int:
    """Choose how many blocks are loaded at once; three of the widest heads take 138 KiB."""
    return 2 if block_d > 128 and has_little_shared_memory(q) else 3
