"""Launch the kernels of ``select_cached_blocks_pooled``."""

import torch
from torch import Tensor

from infllm_flex_ops.device import has_little_shared_memory, knows_float8
from infllm_flex_ops.selection.kernels.decode.pooled_scores import cached_pooled_score_kernel
from infllm_flex_ops.selection.kernels.decode.topk import select_cached
from infllm_flex_ops.selection.kernels.kernel_args import Tile, WindowSlots
from infllm_flex_ops.selection.kernels.prefill.plan import MAX_BLOCKS
from infllm_flex_ops.selection.kernels.prefill.tiles import MAX_WINDOWS, choose_windows
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.sizes import ceil_div, next_power_of_2
from infllm_flex_ops.triton_common.pages import CachedRows
from infllm_flex_ops.triton_common.tensor_args import view

_PROGRAMS = 512  # as many as a GPU holds at a time: a second wave would wait for the first


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
    Hkv, C = compressed.shape[1:3]
    num_blocks = ceil_div(C * rule.kernel_size, rule.block_size)
    columns = max(0, num_blocks - rule.local_blocks)  # that may lie before a query's local blocks
    windows = choose_windows(rule)
    if columns > MAX_BLOCKS or windows.SLOTS > MAX_WINDOWS:
        raise NotImplementedError(
            f"select_cached_blocks_pooled handles at most {MAX_BLOCKS} blocks beside the local "
            f"ones and {MAX_WINDOWS} windows to a block on CUDA, got {columns} and "
            f"{windows.PER_BLOCK}: use another block_size"
        )
    out = torch.empty(B, Hkv, n, width, dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out
    scores = torch.empty(B * Hkv, n, max(columns, 1), dtype=torch.float32, device=q.device)
    if columns and num_blocks >= rule.num_selected:
        _score(q, compressed, start, end, scores, rule, dense_len, float8)
    rows = CachedRows.in_one_piece(q, start, end)
    select_cached(scores, rows, out, columns, rule, dense_len)
    return out


def _score(
    q: Tensor,
    compressed: Tensor,
    start: Tensor,
    end: Tensor,
    scores: Tensor,
    rule: SelectionRule,
    dense_len: int,
    float8: bool,
) -> None:
    """Fill the scores ``[B * Hkv, n, columns]``."""
    heads, n, columns = scores.shape
    windows = choose_windows(rule)
    tile, options = _choose_tile(q, compressed, windows)
    tiles = ceil_div(n, tile.TOKENS)
    step = tile.BLOCK_N // windows.SLOTS
    split_blocks = step * ceil_div(columns * heads * tiles, step * _PROGRAMS)
    cached_pooled_score_kernel[(ceil_div(columns, split_blocks), heads, tiles)](
        q=view(q),
        keys=view(compressed),
        start_ptr=start,
        end_ptr=end,
        scores_ptr=scores,
        n=n,
        C=compressed.shape[2],
        columns=columns,
        split_blocks=split_blocks,
        dense_len=dense_len,
        Hkv=compressed.shape[1],
        RULE=rule,
        WINDOWS=windows,
        TILE=tile,
        FLOAT8=float8,
        HAS_FLOAT8=knows_float8(q),
        **options,
    )


def _choose_tile(
    q: Tensor, compressed: Tensor, windows: WindowSlots
) -> tuple[Tile, dict[str, int]]:
    """Choose as many rows as a matrix instruction takes, and more tokens where there are more."""
    n, D = q.shape[2:]
    wide = compressed.element_size() > 2
    block_d = max(16, next_power_of_2(D))
    max_tokens = 16 if wide or block_d > 128 else 64
    tokens = max(16, min(next_power_of_2(n), max_tokens))
    stages = 1 if wide else 2 if block_d > 128 or has_little_shared_memory(q) else 3
    group = q.shape[1] // compressed.shape[1]
    block_n = max(32 if wide else 64, windows.SLOTS)
    tile = Tile(group, 1, tokens, D, block_d, block_n, wide)
    return tile, {"num_warps": 8 if wide else 4, "num_stages": stages}
