"""Launch the kernels of ``select_blocks_pooled``, over chunks of queries."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from infllm_flex_ops.device import as_readable, has_little_shared_memory
from infllm_flex_ops.pages import gather_windows
from infllm_flex_ops.selection.kernels.kernel_args import KernelSizes, Tile
from infllm_flex_ops.selection.kernels.prefill.plan import (
    SEGMENT_BLOCKS,
    make_plan,
    split_columns,
)
from infllm_flex_ops.selection.kernels.prefill.pooled_scores import pooled_score_kernel
from infllm_flex_ops.selection.kernels.prefill.run_topk import (
    allocate,
    fill_full_rows,
    measure,
    row_arguments,
    run_topk,
    workspace,
)
from infllm_flex_ops.selection.kernels.prefill.tiles import (
    MAX_WINDOWS,
    Inputs,
    choose_pooled_tile,
    choose_windows,
)
from infllm_flex_ops.selection.pool_queries import round_to_float8
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.triton_common.pages import Paging, deepen_pipeline
from infllm_flex_ops.triton_common.tensor_args import view

# Queries from which keys in pages are rounded once, into a copy, and not by each tile of queries.
_COPY_FROM = 1024


class _Keys(NamedTuple):
    """Compressed keys ``[B, Hkv, C, D]``, or those of one row in pages ``[P, Hkv, entries, D]``.

    Attributes:
        compressed: The keys.
        C: Keys of a row.
        table: The row's pages; None for keys in one piece.
        paging: How keys lie in pages; None for keys in one piece.
        rounds: Whether the kernel rounds them to e4m3.
    """

    compressed: Tensor
    C: int
    table: Tensor | None = None
    paging: Paging | None = None
    rounds: bool = False


def launch(
    q: Tensor,
    compressed: Tensor,
    kv_len: int,
    rule: SelectionRule,
    documents: Tensor | None = None,
) -> Tensor:
    """List every block for the rows that take all, and score the others chunk by chunk."""
    keys = _Keys(as_readable(compressed), compressed.shape[2])
    return _launch("select_blocks_pooled", q, keys, kv_len, rule, documents)


def launch_paged(
    q: Tensor, compressed: Tensor, table: Tensor, kv_len: int, rule: SelectionRule
) -> Tensor:
    """Do the same for queries ``[Hkv, Sq, D]`` of one row over pages."""
    size = rule.kernel_size
    page_size = compressed.shape[2] * size
    rounds = q.dtype == torch.float8_e4m3fn and compressed.dtype != torch.float8_e4m3fn
    if rounds and q.shape[1] >= _COPY_FROM:
        keys = _copy_rounded(compressed, table, kv_len // size, rule, page_size)
        return launch(q[None], keys[None], kv_len, rule)[0]
    paging = Paging.of_windows(page_size, size, size)
    keys = _Keys(as_readable(compressed), kv_len // size, table, paging, rounds)
    return _launch("select_paged_chunk_pooled", q[None], keys, kv_len, rule, None)[0]


def _copy_rounded(
    compressed: Tensor, table: Tensor, count: int, rule: SelectionRule, page_size: int
) -> Tensor:
    """Copy a row's keys from its pages ``[P, Hkv, entries, D]``, in e4m3 ``[Hkv, count, D]``."""
    shape = compressed.shape[1], count, compressed.shape[3]
    keys = compressed.new_empty(shape, dtype=torch.float8_e4m3fn)
    for head, out in enumerate(keys):  # one at a time, since the others take twice the memory
        pages = compressed[:, head : head + 1]
        out.copy_(round_to_float8(gather_windows(pages, table, count, *rule.windows, page_size))[0])
    return keys


def _launch(
    name: str, q: Tensor, keys: _Keys, kv_len: int, rule: SelectionRule, documents: Tensor | None
) -> Tensor:
    """Select for all queries; keys in pages are rounded to float8 with them."""
    sizes = measure(name, q, q.shape[1], kv_len, rule, documents)
    windows = choose_windows(rule)
    if windows.PER_BLOCK > MAX_WINDOWS:
        raise NotImplementedError(
            f"{name} handles at most {MAX_WINDOWS} windows to a block on CUDA, got "
            f"{windows.PER_BLOCK}: use a smaller block_size or a larger kernel_size"
        )
    out = allocate(sizes, rule, documents, q.device)
    if out.selected.numel() == 0:
        return out.selected
    q = as_readable(q)
    tile, options = _choose_tile(q, keys, windows.SLOTS)
    plan = make_plan(sizes, rule, tile.TOKENS, 0, stores_segments=True)
    fill_full_rows(plan, out)
    if not plan.chunks:
        return out.selected
    scores = workspace(q, plan.num_scores, plan.columns)
    for chunk in plan.chunks:
        heads, rows = chunk.heads, chunk.rows
        programs = triton.cdiv(len(rows), plan.tokens) * len(heads)
        splits, split_blocks = split_columns(plan.columns, programs)
        pooled_score_kernel[(programs * splits,)](
            q=view(q),
            keys=view(keys.compressed),
            table=keys.table,
            out=scores,
            num_heads=len(heads),
            C=keys.C,
            split_blocks=split_blocks,
            splits=splits,
            SIZES=KernelSizes(rule, plan.part, windows, tile, SEGMENT_BLOCKS),
            PAGING=keys.paging,
            FLOAT8=keys.rounds,
            **row_arguments(plan, heads, rows, out),
            **options,
        )
        run_topk(plan, scores, heads, rows, out)
    return out.selected


def _choose_tile(q: Tensor, keys: _Keys, slots: int) -> tuple[Tile, dict[str, int]]:
    """Choose the sizes of a program, and its warps and stages."""
    inputs = Inputs(1, q.shape[3], q.element_size(), keys.C, has_tma=False)
    tile, options = choose_pooled_tile(inputs, slots, has_little_shared_memory(q))
    if keys.paging is None:
        return tile, options
    key_bytes = keys.compressed.element_size()
    if key_bytes > q.element_size() and tile.BLOCK_D * key_bytes > 256:
        # Keys take twice or four times the memory until they are rounded.
        tile = tile._replace(BLOCK_N=max(slots, min(tile.BLOCK_N, 64)))
    return tile, deepen_pipeline(options)
