"""Launch the kernels of ``select_cached_blocks_pooled``."""

from typing import NamedTuple

import torch
from torch import Tensor

from infllm_flex_ops.device import as_readable, has_little_shared_memory, knows_float8
from infllm_flex_ops.selection.kernels.decode.pooled_scores import cached_pooled_score_kernel
from infllm_flex_ops.selection.kernels.decode.topk import make_scores, select_cached
from infllm_flex_ops.selection.kernels.kernel_args import Tile, WindowSlots
from infllm_flex_ops.selection.kernels.prefill.plan import MAX_BLOCKS
from infllm_flex_ops.selection.kernels.prefill.tiles import MAX_WINDOWS, choose_windows
from infllm_flex_ops.selection.rotary_dims import scores_cache
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.sizes import ceil_div, next_power_of_2
from infllm_flex_ops.triton_common.dependent_launch import dependent_launch, single_launch
from infllm_flex_ops.triton_common.pages import CachedRows
from infllm_flex_ops.triton_common.tensor_args import view

_PROGRAMS = 512  # as many as a GPU holds at a time: a second wave would wait for the first
_STEP_BYTES = 8 << 10  # of keys that a step loads: more on their way gained nothing on an H200


class _Keys(NamedTuple):
    """Compressed keys in one piece or in pages.

    Attributes:
        compressed: The keys.
        C: Keys that a row has room for.
        is_cache: Whether they are the cache itself, in one piece, whose rows begin anywhere.
        float8: Whether they are multiplied in e4m3.
    """

    compressed: Tensor
    C: int
    is_cache: bool
    float8: bool

    @property
    def num_dims(self) -> int:
        """Head dims that are multiplied."""
        return self.compressed.shape[3]


def launch(
    q: Tensor,
    compressed: Tensor,
    start: Tensor,
    end: Tensor,
    rule: SelectionRule,
    dense_len: int,
    width: int,
    float8: bool,
) -> Tensor:
    """Score and select: two launches. Only the device reads lengths."""
    B, _, n, _ = q.shape
    out = torch.empty(B, compressed.shape[1], n, width, dtype=torch.int32, device=q.device)
    is_cache = scores_cache(q, compressed, rule.kernel_size)
    keys = _Keys(as_readable(compressed), compressed.shape[2], is_cache, float8)
    rows = CachedRows.in_one_piece(q, start, end)
    _select("select_cached_blocks_pooled", q, keys, rows, out, rule, dense_len)
    return out


def launch_paged(
    q: Tensor,
    compressed: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    rule: SelectionRule,
    dense_len: int,
    width: int,
    max_queries: int,
    float8: bool,
) -> Tensor:
    """Do the same for ragged queries over pages."""
    _, Hkv, entries, _ = compressed.shape
    out = torch.empty(len(q), Hkv, width, dtype=torch.int32, device=q.device)
    page_size = entries * rule.kernel_size
    rows = CachedRows.in_pages(q, block_table, seq_lens, query_start, max_queries, page_size)
    keys = _Keys(as_readable(compressed), block_table.shape[1] * entries, False, float8)
    _select("select_paged_blocks_pooled", q, keys, rows, out, rule, dense_len)
    return out.transpose(0, 1)


def _select(
    name: str,
    q: Tensor,
    keys: _Keys,
    rows: CachedRows,
    out: Tensor,
    rule: SelectionRule,
    dense_len: int,
) -> None:
    """Fill ``out`` in two launches."""
    num_blocks = ceil_div(keys.C * rule.kernel_size, rule.block_size)
    columns = max(0, num_blocks - rule.local_blocks)  # that may lie before a query's local blocks
    windows = choose_windows(rule)
    if columns > MAX_BLOCKS or windows.SLOTS > MAX_WINDOWS:
        raise NotImplementedError(
            f"{name} handles at most {MAX_BLOCKS} blocks beside the local ones and {MAX_WINDOWS} "
            f"windows to a block on CUDA, got {columns} and {windows.PER_BLOCK}: use another "
            f"block_size"
        )
    if out.numel() == 0 or rows.B == 0 or rows.n == 0:
        return
    heads = rows.B * keys.compressed.shape[1]
    scores = make_scores(rows, heads, columns, has_tail=False)
    overlap = single_launch()
    if columns and num_blocks >= rule.num_selected:
        _score(q, keys, rows, scores, rule, dense_len)
        overlap = dependent_launch(q)
    select_cached(scores, rows, out, rule, dense_len, overlap)


def _score(
    q: Tensor,
    keys: _Keys,
    rows: CachedRows,
    scores: Tensor,
    rule: SelectionRule,
    dense_len: int,
) -> None:
    """Fill the scores ``[B * Hkv, n, 1, columns]``."""
    heads, n, _, columns = scores.shape
    windows = choose_windows(rule)
    tile, options = _choose_tile(q, keys, rows, windows)
    tiles = ceil_div(n, tile.TOKENS)
    step = tile.BLOCK_N // windows.SLOTS
    split_blocks = step * ceil_div(columns * heads * tiles, step * _PROGRAMS)
    cached_pooled_score_kernel[(ceil_div(columns, split_blocks), heads, tiles)](
        q=rows.q,
        keys=view(keys.compressed),
        pages=rows.pages,
        start_ptr=rows.start,
        end_ptr=rows.end,
        scores_ptr=scores,
        n=n,
        C=keys.C,
        columns=columns,
        split_blocks=split_blocks,
        dense_len=dense_len,
        Hkv=keys.compressed.shape[1],
        RULE=rule,
        WINDOWS=windows,
        TILE=tile,
        HEAD_DIM=q.shape[-1],
        IS_CACHE=keys.is_cache,
        FLOAT8=keys.float8,
        HAS_FLOAT8=knows_float8(q),
        PAGING=rows.windows(*rule.windows),
        **dependent_launch(q),
        **options,
    )


def _choose_tile(
    q: Tensor, keys: _Keys, rows: CachedRows, windows: WindowSlots
) -> tuple[Tile, dict[str, int]]:
    """Choose as many rows as a matrix instruction takes, and more tokens where there are more."""
    wide = keys.compressed.element_size() > 2
    block_d = max(16, next_power_of_2(keys.num_dims))
    max_tokens = 16 if wide or block_d > 128 else 64
    tokens = max(16, min(next_power_of_2(rows.n), max_tokens))
    stages = 1 if wide else 2 if block_d > 128 or has_little_shared_memory(q) else 3
    group = q.shape[1] // keys.compressed.shape[1]
    # A step loads more keys of few dims: up to 8 KiB, where registers hold their scores. Over pages
    # it looks up the page of each key where it does not lie in one.
    fitting = _STEP_BYTES // (block_d * keys.compressed.element_size())
    most = 256 if tokens == 16 and rows.pages is None else 128
    block_n = 32 if wide else min(max(fitting, 64), most)
    block_n = max(block_n, windows.SLOTS)
    tile = Tile(group, 1, tokens, keys.num_dims, block_d, block_n, wide)
    warps = 8 if wide and rows.pages is None else 4  # eight spill on Ada over pages
    return tile, rows.pipeline({"num_warps": warps, "num_stages": stages})
