"""Attention from the newest tokens of each row to its pages."""

from __future__ import annotations

import torch
from torch import Tensor

import infllm_flex_ops
from infllm_flex.decoding.paged.batch import PagedBatch
from infllm_flex.decoding.paged.cache import PagedCache
from infllm_flex.decoding.paged.selection import select_chunk, select_few
from infllm_flex.validation import resolve_scale


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
    selected = select_few(query, cache, batch, scale)
    return infllm_flex_ops.attend_paged_blocks(
        query,
        cache.key,
        cache.value,
        selected,
        *batch[:3],
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
