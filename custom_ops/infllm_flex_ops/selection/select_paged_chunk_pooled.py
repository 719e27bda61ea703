"""Select the blocks of one row of a cache in pages for many queries, pooled by group."""

from typing import Any

import torch
from torch import Tensor

from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.pages import gather_windows
from infllm_flex_ops.selection.pool_queries import round_to_float8
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.selection.select_blocks_pooled import select_blocks_pooled


@define_operator()
def select_paged_chunk_pooled(
    q: Tensor,
    compressed: Tensor,
    table: Tensor,
    kv_len: int,
    window: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    num_selected: int,
) -> Tensor:
    """Select the blocks of a row's last tokens, as ``select_blocks_pooled`` does, from pages.

    On a GPU the keys are read from their pages. Only for 1024 and more queries in e4m3, over keys
    in another dtype, is a copy of the row's keys made, of one byte per number.

    Args:
        q: Pooled queries ``[Hkv, Sq, num_dims]``, the last ``Sq`` of ``kv_len`` tokens, of the dims
            that the keys have, in the dtype of the keys or in e4m3. The keys are then rounded to
            e4m3 as well, as ``pool_queries`` and ``select_cached_blocks_pooled`` round.
        compressed: For windows of one key in all dims the pages of keys ``[P, Hkv, page, D]``. Else
            those of compressed keys ``[P, Hkv, page / window, num_dims]``, as
            ``append_paged_windows`` writes them. Slots beyond the row's length, or in other rows'
            pages, may hold anything.
        table: The row's pages in order, int32 ``[max_pages]``.
        kv_len: Tokens of the row.
        window: Pooling window of the compressed keys, in tokens.
        block_size: Keys per block, a multiple of ``window``.
        init_blocks: First blocks, always selected.
        local_blocks: Blocks before the query's own that are always selected, as its own is.
        num_selected: Budget in blocks; forced blocks count toward it.

    Returns:
        Selected blocks, int32 ``[Hkv, Sq, K]`` with ``K = min(num_selected, Nkv)``, ascending,
        unused slots last as -1. Ties go to the lower block; a NaN ranks below every number.
    """
    rule = SelectionRule.from_pooled(window, block_size, init_blocks, local_blocks, num_selected)
    page_size, count = compressed.shape[2] * window, rule.windows.num_visible(kv_len - 1)
    keys = gather_windows(compressed, table, count, *rule.windows, page_size)
    keys = round_to_float8(keys) if q.dtype == torch.float8_e4m3fn else keys
    return select_blocks_pooled(q[None], keys[None], kv_len, *rule.pooled)[0]


@select_paged_chunk_pooled.register_fake
def _(q: Tensor, compressed: Tensor, table: Tensor, kv_len: int, *rest: Any) -> Tensor:
    rule = SelectionRule.from_pooled(*rest)
    return q.new_empty(*q.shape[:2], rule.num_slots(kv_len), dtype=torch.int32)


def _pack(*args: Any) -> tuple[Any, ...]:
    return *args[:4], SelectionRule.from_pooled(*args[4:])


cuda_launcher(
    select_paged_chunk_pooled,
    "selection.kernels.prefill.launch_pooled",
    "launch_paged",
    pack=_pack,
)
