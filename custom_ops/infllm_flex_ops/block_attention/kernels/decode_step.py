"""Launch the kernels of ``decode_step`` and ``paged_step``.

Each kernel reads what the one before it wrote. Within a kernel the last program of a KV head merges
the results of the others, which would take two launches more.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from infllm_flex_ops.block_attention.kernels.attend_cached_blocks import choose_tile
from infllm_flex_ops.block_attention.kernels.attend_cached_blocks.attend_and_join import (
    Join,
    attend_and_join_kernel,
)
from infllm_flex_ops.block_attention.kernels.attend_cached_blocks.split import Shape
from infllm_flex_ops.selection.kernels import append_windows
from infllm_flex_ops.selection.kernels.append_token import Appended, AppendedKind
from infllm_flex_ops.selection.kernels.decode.launch import Append, Keys, select
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.sizes import ceil_div, group_size, next_power_of_2
from infllm_flex_ops.triton_common.arrivals import COUNTERS
from infllm_flex_ops.triton_common.pages import CachedRows
from infllm_flex_ops.triton_common.tensor_args import view

_PROGRAMS = 512  # several per multiprocessor
_MAX_SPLITS = 32  # per list; one program joins their results
_JOINING_PROGRAMS = 256  # up to which values are divided, so that more programs join
_MAX_PARTS = 4
_MIN_PART = 32  # elements of a value
_JOINED = 8192  # elements that a program adds at once


class Bounds(NamedTuple):
    """Where rows begin and end, and what they become; as in ``append_windows``."""

    start: Tensor
    end: Tensor
    new_start: Tensor | None
    new_end: Tensor | None
    num_new: int


class Plan(NamedTuple):
    """How the attention of a step is divided among programs.

    Attributes:
        splits: Programs per list, each with some of its slots.
        parts: Parts of a value, with programs of their own.
    """

    splits: int
    parts: int


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed: Tensor,
    coarse: Tensor | None,
    start: Tensor,
    end: Tensor,
    new_start: Tensor | None,
    new_end: Tensor | None,
    num_new: int,
    rule: SelectionRule,
    dense_len: int,
    width: int,
    scale: float,
) -> Tensor:
    """Append, select and attend in three launches, or in one more for several new slots."""
    bounds = Bounds(start, end, new_start, new_end, num_new)
    B, Hkv = k.shape[:2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    append = _append(k, compressed, coarse, bounds, rule)
    if out.numel() == 0:
        return out
    grown_end = end if append is None else append.token.next_end
    selected = torch.empty(B, Hkv, 1, width, dtype=torch.int32, device=q.device)
    counters = torch.empty(B * Hkv, COUNTERS, dtype=torch.int32, device=q.device)
    coarse = compressed if coarse is None else coarse
    keys = Keys(compressed, coarse, compressed.shape[2], coarse.shape[2])
    rows = CachedRows.in_one_piece(q, start, grown_end)
    select(q, keys, rows, selected, rule, dense_len, scale, append, counters)
    old_end = None if grown_end is end else end
    _attend(q, k, v, selected, rows, k.shape[2], old_end, counters, out, rule, dense_len, scale)
    return out


def launch_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    rule: SelectionRule,
    dense_len: int,
    width: int,
    scale: float,
) -> Tensor:
    """Select and attend over pages in three launches."""
    (B, max_pages), (Hkv, page_size) = block_table.shape, k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0 or not B:
        return out
    selected = torch.empty(len(q), Hkv, width, dtype=torch.int32, device=q.device)
    counters = torch.empty(B * Hkv, COUNTERS, dtype=torch.int32, device=q.device)
    capacity = max_pages * page_size
    keys = Keys.in_pages(compressed, coarse, capacity, rule)
    rows = CachedRows.in_pages(q, block_table, seq_lens, query_start, 1, page_size)
    select(q, keys, rows, selected, rule, dense_len, scale, None, counters)
    _attend(q, k, v, selected, rows, capacity, None, counters, out, rule, dense_len, scale)
    return out


def _append(
    k: Tensor, compressed: Tensor, coarse: Tensor | None, bounds: Bounds, rule: SelectionRule
) -> Append | None:
    """Leave one new token to the first kernel; append any other number of slots before it."""
    start, end, new_start, new_end, num_new = bounds
    if num_new != 1:
        if num_new or new_start is not None or new_end is not None:
            sizes = (*rule.windows, *rule.coarse_windows)
            append_windows.launch(k, compressed, coarse, *bounds, *sizes)
        return None
    B = k.shape[0]
    kind = AppendedKind.of(rule, coarse is not None, new_start is not None, new_end is not None)
    new_start = start if new_start is None else new_start.expand(B)
    next_end = torch.empty_like(end) if new_end is None else end
    new_end = end if new_end is None else new_end.expand(B)
    strides = new_start.stride(0), new_end.stride(0)
    token = Appended(view(k), new_start, strides[0], new_end, strides[1], next_end)
    return Append(token, kind, k.shape[2], start, end)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    rows: CachedRows,
    capacity: int,
    old_end: Tensor | None,
    counters: Tensor,
    out: Tensor,
    rule: SelectionRule,
    dense_len: int,
    scale: float,
) -> None:
    """Fill ``out``, and ``old_end`` with the new end; a row has room for ``capacity`` tokens."""
    lists, D = len(counters), q.shape[-1]
    shape = Shape(group_size(q.shape[1], k.shape[1]), D, rule.block_size, rows.page_size)
    tile, options = choose_tile(q, k, v, shape)
    plan = plan_attention(lists, selected.shape[-1], rule.num_selected, tile.BLOCK_D)
    part = tile.BLOCK_D // plan.parts
    results = lists, ceil_div(D, part), plan.splits
    sums = torch.empty(*results, tile.ROWS, part, dtype=torch.float32, device=q.device)
    maxima = torch.empty(*results, 2, tile.ROWS, dtype=torch.float32, device=q.device)
    splits = next_power_of_2(plan.splits)
    attend_and_join_kernel[(plan.splits, ceil_div(D, part), lists)](
        q=rows.q,
        k=view(k),
        v=view(v),
        selected_ptr=selected,
        pages=rows.pages,
        start_ptr=rows.start,
        end_ptr=rows.end,
        old_end_ptr=old_end,
        sums_ptr=sums,
        maxima_ptr=maxima,
        counters_ptr=counters,
        out_ptr=out,
        S=capacity,
        width=selected.shape[-1],
        K=rule.num_selected,
        dense_len=dense_len,
        qk_scale_log2=scale * math.log2(math.e),
        Hkv=k.shape[1],
        SHAPE=shape,
        TILE=tile,
        JOIN=Join(part, splits, max(1, min(splits, _JOINED // (tile.ROWS * part)))),
        **rows.pipeline(options),
    )


def plan_attention(lists: int, width: int, num_selected: int, block_d: int) -> Plan:
    """Divide the lists, and the values where few programs would join long lists.

    A list of the budget is divided evenly; longer ones, of dense queries, nearly so.
    """
    slots = max(1, min(width, num_selected))
    wanted = max(1, min(_MAX_SPLITS, _PROGRAMS // lists))
    splits = ceil_div(slots, ceil_div(slots, wanted))
    parts = 1
    while (
        parts < _MAX_PARTS
        and 2 * parts * _MIN_PART <= block_d
        and 2 * parts * splits * lists <= _JOINING_PROGRAMS
    ):
        parts *= 2
    return Plan(splits, parts)
