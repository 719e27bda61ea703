"""Attention from the newest tokens of each row to its pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import infllm_flex_ops
from infllm_flex.decoding.paged.batch import FEW_QUERIES, LongRow, PagedBatch
from infllm_flex.decoding.paged.cache import PagedCache
from infllm_flex.decoding.paged.selection import longest_full, select_chunk, select_few
from infllm_flex.validation import resolve_scale
from infllm_flex_ops.dispatch import is_plain_on_cpu

# Longer rows keep the device busy by themselves, with kernels that are faster on Hopper.
MAX_SHARED_LENGTH = 2048


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
        scale: Factor on the dot products, positive. Defaults to ``1 / sqrt(D)``.

    Returns:
        ``[T, Hq, D]`` in the dtype of ``query``. Queries that belong to no row get anything.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the scale is not positive.
    """
    _check_query(query, cache.key)
    _check_batch(query, batch)
    scale = resolve_scale(query, scale)
    if batch.max_few:
        out = _attend_few(query, cache, batch, scale)
    else:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    most = min(longest_full(cache), MAX_SHARED_LENGTH)
    short = [row for row in batch.long_rows if row.length <= most]
    _attend_fully(query, cache, batch, short, most, scale, out)
    for row in batch.long_rows:
        if row.length > most:
            own, table = slice(row.start, row.end), batch.block_table[row.row]
            out[own] = _attend_many(query[own], cache, table, row.length, scale)
    return out


def _attend_fully(
    query: Tensor,
    cache: PagedCache,
    batch: PagedBatch,
    rows: Sequence[LongRow],
    most: int,
    scale: float,
    out: Tensor,
) -> None:
    """Fill ``out`` for the rows that have many queries and at most ``most`` tokens, in one go.

    Their queries attend to all earlier tokens.
    """
    if not rows:
        return
    first = min(row.row for row in rows)
    infllm_flex_ops.attend_paged_rows(
        query,
        cache.key,
        cache.value,
        out,
        *(batch.block_table, batch.seq_lens, batch.query_start),
        first,
        max(row.row for row in rows) - first + 1,
        cache.config.block_size,
        FEW_QUERIES + 1,
        max(row.end - row.start for row in rows),
        most,
        scale,
    )


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


def _check_batch(query: Tensor, batch: PagedBatch) -> None:
    """Check that the queries of the rows exist; of rows with few of them on the CPU only."""
    end = batch.long_rows[-1].end if batch.long_rows else 0
    if is_plain_on_cpu(query):
        end = int(batch.query_start[-1])
    if end > len(query):
        raise ValueError(f"query must hold the {end} queries of the rows, got {len(query)}")


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
