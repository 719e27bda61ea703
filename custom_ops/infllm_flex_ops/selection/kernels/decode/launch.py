"""Launch the kernels of ``select_cached_blocks``: few queries, windows divided among programs.

Grids are sized by the room that the windows have, and programs beyond a row's length end at once.
Only the device reads lengths, so the launches fit in a CUDA graph.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from infllm_flex_ops.selection.compress_keys import num_windows
from infllm_flex_ops.selection.kernels.decode.lse import cached_lse_kernel
from infllm_flex_ops.selection.kernels.decode.scores import cached_score_kernel
from infllm_flex_ops.selection.kernels.decode.topk import make_scores, select_cached
from infllm_flex_ops.selection.kernels.kernel_args import Tile, WindowSlots
from infllm_flex_ops.selection.kernels.prefill.plan import check_num_blocks
from infllm_flex_ops.selection.kernels.prefill.tiles import choose_windows
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.sizes import ceil_div, next_power_of_2
from infllm_flex_ops.triton_common.dependent_launch import dependent_launch, single_launch
from infllm_flex_ops.triton_common.pages import CachedRows
from infllm_flex_ops.triton_common.tensor_args import view

_MAX_RUNS = 64  # of coarse keys, a program each; the next kernel reads the results of all
_MAX_ROWS = 64  # heads x tokens of a tile
_PROGRAMS = 512  # as many as a GPU holds at a time: a second wave would wait for the first


class _Keys(NamedTuple):
    """Compressed and coarse keys, in pieces or in pages, and how many a row has room for."""

    compressed: Tensor
    coarse: Tensor
    C: int
    C2: int


class _Split(NamedTuple):
    """How a decode step is divided among programs.

    Attributes:
        tiles: Tiles of queries.
        runs: Runs of coarse keys.
        run_keys: Coarse keys of a run.
        split_blocks: Blocks that a program scores.
    """

    tiles: int
    runs: int
    run_keys: int
    split_blocks: int


def launch(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    start: Tensor,
    end: Tensor,
    rule: SelectionRule,
    dense_len: int,
    width: int,
    scale: float,
) -> Tensor:
    """Normalise, score and select: three launches."""
    B, _, n, _ = q.shape
    out = torch.empty(B, compressed.shape[1], n, width, dtype=torch.int32, device=q.device)
    keys = _Keys(compressed, coarse, compressed.shape[2], coarse.shape[2])
    _select(q, keys, CachedRows.in_one_piece(q, start, end), out, rule, dense_len, scale)
    return out


def launch_paged(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    rule: SelectionRule,
    dense_len: int,
    width: int,
    max_queries: int,
    scale: float,
) -> Tensor:
    """Do the same for ragged queries over pages."""
    out = torch.empty(len(q), compressed.shape[1], width, dtype=torch.int32, device=q.device)
    page_size = compressed.shape[2] * rule.kernel_stride
    capacity = block_table.shape[1] * page_size
    room = (num_windows(capacity, *kind) for kind in (rule.windows, rule.coarse_windows))
    rows = CachedRows.in_pages(q, block_table, seq_lens, query_start, max_queries, page_size)
    _select(q, _Keys(compressed, coarse, *room), rows, out, rule, dense_len, scale)
    return out.transpose(0, 1)


def _select(
    q: Tensor,
    keys: _Keys,
    rows: CachedRows,
    out: Tensor,
    rule: SelectionRule,
    dense_len: int,
    scale: float,
) -> None:
    """Fill ``out`` in three launches."""
    num_keys = (keys.C - 1) * rule.kernel_stride + rule.kernel_size if keys.C else 0
    num_blocks = ceil_div(num_keys, rule.block_size)
    columns = max(0, num_blocks - rule.local_blocks)  # that may lie before a query's local blocks
    check_num_blocks("select_cached_blocks", columns, "blocks beside the local ones")
    if out.numel() == 0 or rows.B == 0 or rows.n == 0:
        return
    heads = rows.B * keys.compressed.shape[1]
    scores = make_scores(rows, heads, columns, choose_windows(rule).TAIL > 0)
    overlap = single_launch()
    if columns and num_blocks >= rule.num_selected:
        _score(q, keys, rows, scores, rule, dense_len, scale)
        overlap = dependent_launch(q)
    select_cached(scores, rows, out, rule, dense_len, overlap)


def _score(
    q: Tensor,
    keys: _Keys,
    rows: CachedRows,
    scores: Tensor,
    rule: SelectionRule,
    dense_len: int,
    scale: float,
) -> None:
    """Fill the scores ``[B * Hkv, n, 1 or 2, columns]``."""
    compressed, coarse = keys.compressed, keys.coarse
    n, heads, Hkv = rows.n, len(scores), compressed.shape[1]
    windows = choose_windows(rule)
    tile, options = _choose_tile(q, Hkv, n, windows.SLOTS)
    split = _split(n, heads, keys.C2, scores.shape[-1], tile, windows)
    num_parts = heads * split.tiles * split.runs
    partial = torch.empty(
        num_parts, 2, tile.HEADS * tile.TOKENS, dtype=torch.float32, device=q.device
    )
    shared = {
        "pages": rows.pages,
        "start_ptr": rows.start,
        "end_ptr": rows.end,
        "partial_ptr": partial,
        "n": n,
        "C": keys.C,
        "C2": keys.C2,
        "run_keys": split.run_keys,
        "qk_scale_log2": scale * math.log2(math.e),
        "dense_len": dense_len,
        "Hkv": Hkv,
        "RULE": rule,
        "TILE": tile,
        "PAGING": rows.windows(*rule.windows),
        **dependent_launch(q),
    }
    cached_lse_kernel[(split.runs, heads, split.tiles)](
        q_ptr=q,
        keys_ptr=compressed,
        coarse_ptr=coarse,
        q_strides=rows.q[1:],
        keys_strides=compressed.stride(),
        coarse_strides=coarse.stride(),
        COARSE_PAGING=rows.windows(*rule.coarse_windows),
        SINGLE=_has_single_steps(split, tile),
        **options,
        **shared,
    )
    columns = scores.shape[-1]
    cached_score_kernel[(ceil_div(columns, split.split_blocks), heads, split.tiles)](
        q=rows.q,
        keys=view(compressed),
        scores_ptr=scores,
        columns=columns,
        runs=split.runs,
        split_blocks=split.split_blocks,
        WINDOWS=windows,
        RUNS=next_power_of_2(split.runs),
        **options,
        **shared,
    )


def _split(
    n: int, heads: int, num_coarse: int, columns: int, tile: Tile, windows: WindowSlots
) -> _Split:
    """Divide a step: about ``_PROGRAMS`` programs, each with whole steps of keys and of blocks."""
    tiles = ceil_div(n, tile.TOKENS)
    rows = heads * tiles
    keys = max(ceil_div(num_coarse, _MAX_RUNS), ceil_div(num_coarse * rows, _PROGRAMS), 1)
    run_keys = tile.BLOCK_N * ceil_div(keys, tile.BLOCK_N)
    step = tile.BLOCK_N // windows.SLOTS
    split_blocks = step * ceil_div(columns * rows, step * _PROGRAMS)
    return _Split(tiles, max(1, ceil_div(num_coarse, run_keys)), run_keys, split_blocks)


def _has_single_steps(split: _Split, tile: Tile) -> bool:
    """Whether a run is one step, whose loads fit in registers: 64 rows spill on sm_100."""
    return split.run_keys == tile.BLOCK_N and tile.HEADS * tile.TOKENS <= 32 and not tile.FP32


def _choose_tile(q: Tensor, num_kv_heads: int, n: int, slots: int) -> tuple[Tile, dict[str, int]]:
    """Choose as many rows as a matrix instruction takes, and more tokens where there are more."""
    group, D = q.shape[1] // num_kv_heads, q.shape[-1]
    heads = next_power_of_2(group)
    max_tokens = max(_MAX_ROWS // heads, 1)
    tokens = max(min(next_power_of_2(n), max_tokens), 16 // heads, 1)
    fp32 = q.element_size() > 2  # without tensor cores
    block_n = max(32 if fp32 else 64, slots)
    block_d = max(16, next_power_of_2(D))
    tile = Tile(group, heads, tokens, D, block_d, block_n, fp32)
    return tile, {"num_warps": 4, "num_stages": 1 if fp32 else 3}
