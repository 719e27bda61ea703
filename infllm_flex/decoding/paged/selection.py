"""Select the blocks of the newest tokens of rows in pages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import infllm_flex_ops
from infllm_flex.decoding.attention import list_width
from infllm_flex.decoding.paged.batch import PagedBatch
from infllm_flex.decoding.paged.cache import PagedCache
from infllm_flex.selection import pool_queries
from infllm_flex_ops.pages import gather_windows


def longest_full(cache: PagedCache) -> int:
    """Length of a row up to which every query attends to all earlier tokens, dense or not."""
    return max(cache.config.dense_len - 1, cache.rule.budget_tokens)


def select_few(query: Tensor, cache: PagedCache, batch: PagedBatch, scale: float) -> Tensor:
    """Select the blocks of the rows with few queries; dense ones get all blocks up to their own.

    Args:
        query: ``[T, Hq, D]``, the queries of all rows.
        cache: The pages, with the windows of these tokens in them.
        batch: The rows.
        scale: Factor on the dot products.

    Returns:
        int32 ``[Hkv, T, W]``, ascending, unused slots last as -1. Lists of other rows may hold
        anything.
    """
    config, rule, rows = cache.config, cache.rule, batch[:3]
    width = list_width(config, batch.block_table.shape[1] * cache.page_size)
    limits = config.dense_len, width, batch.max_few
    if config.pool_queries:
        return infllm_flex_ops.select_paged_blocks_pooled(
            query, cache.scored, *rows, *rule.pooled, *limits, config.score_dtype == "float8"
        )
    coarse = cache.scored if cache.coarse is None else cache.coarse
    return infllm_flex_ops.select_paged_blocks(
        query, cache.scored, coarse, *rows, *rule, *limits, scale
    )


def select_chunk(
    query: Tensor, cache: PagedCache, table: Tensor, length: int, scale: float
) -> Tensor:
    """Select the blocks of a row's last tokens; dense ones get all blocks up to their own.

    Args:
        query: ``[Sq, Hq, D]``, the last ``Sq`` tokens of the row.
        cache: The pages, with the windows of these tokens in them.
        table: The row's pages, int32 ``[max_pages]``.
        length: Tokens of the row.
        scale: Factor on the dot products.

    Returns:
        int32 ``[Hkv, Sq, W]``, ascending, unused slots last as -1.
    """
    config = cache.config
    q_offset = length - query.shape[0]
    num_full = min(query.shape[0], max(0, longest_full(cache) - q_offset))
    lists = []
    if num_full:
        position = torch.arange(q_offset, q_offset + num_full, device=query.device)
        own = position[:, None] // config.block_size
        block = torch.arange(
            (q_offset + num_full - 1) // config.block_size + 1, device=query.device
        )
        full = torch.where(block <= own, block, -1).int()
        lists.append(full.expand(cache.key.shape[1], -1, -1))
    if num_full < query.shape[0]:
        select = _select_by_pooled if config.pool_queries else _select_by_copies
        lists.append(select(query[num_full:].transpose(0, 1)[None], cache, table, length, scale))
    width = max(x.shape[-1] for x in lists)
    padded = [F.pad(x, (0, width - x.shape[-1]), value=-1) for x in lists]
    return torch.cat(padded, 1) if len(padded) > 1 else padded[0]


def _select_by_copies(
    query: Tensor, cache: PagedCache, table: Tensor, length: int, scale: float
) -> Tensor:
    """Select for ``query [1, Hq, Sq, D]`` by copies of the row's compressed and coarse keys.

    These are a sixteenth of its keys by default, and no more.
    """
    rule = cache.rule
    windows = [
        gather_windows(pages, table, kind.num_visible(length - 1), *kind, cache.page_size)[None]
        for pages, kind in ((cache.compressed, rule.windows), (cache.coarse, rule.coarse_windows))
        if pages is not None
    ]
    return infllm_flex_ops.select_blocks(query, windows[0], windows[-1], length, *rule, scale)[0]


def _select_by_pooled(
    query: Tensor, cache: PagedCache, table: Tensor, length: int, scale: float
) -> Tensor:
    """Select for ``query [1, Hq, Sq, D]``, pooled, by keys in their pages; needs no scale."""
    pooled = pool_queries(query, cache.key.shape[1], cache.config)[0]
    return infllm_flex_ops.select_paged_chunk_pooled(
        pooled, cache.scored, table, length, *cache.rule.pooled
    )
