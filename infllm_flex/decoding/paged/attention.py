"""Attention from the newest tokens of each row to its pages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import infllm_flex_ops
from infllm_flex.decoding.attention import list_width
from infllm_flex.decoding.paged.batch import PagedBatch
from infllm_flex.decoding.paged.cache import PagedCache
from infllm_flex.validation import resolve_scale
from infllm_flex_ops.pages import gather_windows


@torch.no_grad()
def paged_attention(
    query: Tensor, cache: PagedCache, batch: PagedBatch, *, scale: float | None = None
) -> Tensor:
    """Attend from the newest tokens of each row, densely or sparsely by each token's position.

    The result of a token depends on the tokens of its row up to it, not on how they came: as one
    prompt, in chunks, from shared pages or one by one. Rows with few queries take launches whose
    shapes depend on no length, so that a CUDA graph can capture them.

    Args:
        query: ``[T, Hq, D]``, after the rotary embedding, those of a row side by side.
        cache: The pages, with the keys, values and windows of these tokens in them.
        batch: The rows.
        scale: Factor on the dot products. Defaults to ``1 / sqrt(D)``.

    Returns:
        ``[T, Hq, D]`` in the dtype of ``query``. Queries that belong to no row get anything.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    _check_query(query, cache.key)
    scale = resolve_scale(query, scale)
    if batch.max_few:
        out = _attend_few(query, cache, batch, scale)
    else:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for row in batch.long_rows:
        own = slice(row.start, row.end)
        out[own] = _attend_many(query[own], cache, batch.block_table[row.row], row.length, scale)
    return out


def _attend_few(query: Tensor, cache: PagedCache, batch: PagedBatch, scale: float) -> Tensor:
    rows = batch.block_table, batch.seq_lens, batch.query_start
    capacity = batch.block_table.shape[1] * cache.page_size
    selected = infllm_flex_ops.select_paged_blocks(
        query,
        cache.compressed,
        cache.compressed if cache.coarse is None else cache.coarse,
        *rows,
        *cache.rule,
        cache.config.dense_len,
        list_width(cache.config, capacity),
        batch.max_few,
        scale,
    )
    return infllm_flex_ops.attend_paged_blocks(
        query,
        cache.key,
        cache.value,
        selected,
        *rows,
        cache.config.block_size,
        batch.max_few,
        scale,
    )


def _attend_many(
    query: Tensor, cache: PagedCache, table: Tensor, length: int, scale: float
) -> Tensor:
    """Attend from the last tokens ``[Sq, Hq, D]`` of a row of ``length`` tokens."""
    selected = select_chunk(query, cache, table, length, scale)
    return infllm_flex_ops.attend_paged_chunk(
        query, cache.key, cache.value, selected, table, length, cache.config.block_size, scale
    )


def select_chunk(
    query: Tensor, cache: PagedCache, table: Tensor, length: int, scale: float
) -> Tensor:
    """Select the blocks of a row's last tokens; dense ones get all blocks up to their own.

    The compressed and coarse keys of the row are copied out of the pages: a sixteenth of its keys
    by default, and no more.

    Args:
        query: ``[Sq, Hq, D]``, the last ``Sq`` tokens of the row.
        cache: The pages, with the windows of these tokens in them.
        table: The row's pages, int32 ``[max_pages]``.
        length: Tokens of the row.
        scale: Factor on the dot products.

    Returns:
        int32 ``[Hkv, Sq, W]``, ascending, unused slots last as -1.
    """
    rule, config = cache.rule, cache.config
    first = length - query.shape[0]
    # A query before this position sees no more blocks than its list holds, dense or not.
    num_full = min(query.shape[0], max(0, max(config.dense_len - 1, rule.budget_tokens) - first))
    lists = []
    if num_full:
        position = torch.arange(first, first + num_full, device=query.device)
        own = position[:, None] // config.block_size
        block = torch.arange((first + num_full - 1) // config.block_size + 1, device=query.device)
        full = torch.where(block <= own, block, -1).int()
        lists.append(full.expand(cache.key.shape[1], -1, -1))
    if num_full < query.shape[0]:
        windows = [
            gather_windows(pages, table, kind.num_visible(length - 1), *kind, cache.page_size)
            for pages, kind in (
                (cache.compressed, rule.windows),
                (cache.coarse, rule.coarse_windows),
            )
            if pages is not None
        ]
        compressed, coarse = windows[0][None], windows[-1][None]
        queries = query[num_full:].transpose(0, 1)[None]
        scored = infllm_flex_ops.select_blocks(queries, compressed, coarse, length, *rule, scale)
        lists.append(scored[0])
    width = max(x.shape[-1] for x in lists)
    padded = [F.pad(x, (0, width - x.shape[-1]), value=-1) for x in lists]
    return torch.cat(padded, 1) if len(padded) > 1 else padded[0]


def _check_query(query: Tensor, key: Tensor) -> None:
    if query.dim() != 3 or query.shape[2] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query must be [T, Hq, D] with Hq a multiple of {key.shape[1]} and D = "
            f"{key.shape[3]}, got {list(query.shape)}"
        )
    if (query.dtype, query.device) != (key.dtype, key.device):
        raise ValueError(
            f"query must be {key.dtype} on {key.device} as the pages are, "
            f"got {query.dtype} on {query.device}"
        )
