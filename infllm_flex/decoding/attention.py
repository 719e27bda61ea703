"""One decode step: the newest tokens of each row attend to its cache."""

from __future__ import annotations

import torch
from torch import Tensor

import infllm_flex_ops
from infllm_flex.autocast import as_autocast, attention_dtype
from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding.compressed_keys import CompressedKeys
from infllm_flex.validation import check_query_and_key, resolve_scale
from infllm_flex_ops.decode_step import decode_step
from infllm_flex_ops.dispatch import is_plain_on_cpu, skip_dispatcher, without_grad
from infllm_flex_ops.sizes import ceil_div


@without_grad
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    compressed_keys: CompressedKeys,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend from the newest tokens of each row, densely while the row is short, then sparsely.

    The cost grows with the number of compressed keys; only the attended blocks of the cache are
    read. Nothing waits for the device, and no shape depends on a length other than ``S``. A step
    over a preallocated cache is therefore one graph, and a CUDA graph can capture it. Inside an
    autocast region inputs are cast as SDPA casts them, the cache only where it is read.

    Args:
        query: ``[B, Hq, n, D]``, the last ``n`` tokens, after the rotary embedding; few at a time.
        key: The cache ``[B, Hkv, S, D]``, with the newest tokens in it; may be preallocated.
        value: The cache ``[B, Hkv, S, D]``.
        compressed_keys: Those of ``key``, with the newest tokens appended. A query is dense iff
            its row holds fewer than ``dense_len`` tokens up to it, its own included.
        scale: Factor on the dot products, positive. Defaults to ``1 / sqrt(D)``.

    Returns:
        ``[B, Hq, n, D]`` in the dtype of ``query``, or that of autocast; 0 for a query that is
        padding. Not differentiable.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the scale is not positive. A
            row that is longer than the cache, where reading does not wait for a device.
    """
    query = as_autocast(query)
    check_query_and_key(query, key)
    if value.dtype != query.dtype and attention_dtype(value) != query.dtype:
        raise ValueError(f"query and value must have one dtype, got {query.dtype}, {value.dtype}")
    if value.shape != key.shape or value.device != key.device:
        raise ValueError(
            f"value must be {list(key.shape)} on {key.device} as key is, "
            f"got {list(value.shape)} on {value.device}"
        )
    scale = resolve_scale(query, scale)
    keys = compressed_keys
    if query.shape[2] == 1 and is_plain_on_cpu(query) and not keys.config.pool_queries:
        keys.check_key(key)
        compressed, coarse = _windows(keys, query)
        return decode_step(
            query,
            key,
            value,
            compressed,
            coarse,
            keys.start,
            keys.end,
            keys.rule,
            keys.config.dense_len,
            scale,
        )
    selected = select_cached(query, keys, capacity=key.shape[2], scale=scale, key=key)
    return skip_dispatcher(infllm_flex_ops.attend_cached_blocks, query)(
        query,
        key,
        value,
        selected,
        keys.start,
        keys.end,
        keys.config.block_size,
        scale,
    )


@without_grad
def select_cached(
    query: Tensor,
    compressed_keys: CompressedKeys,
    *,
    capacity: int,
    scale: float | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Select the blocks of the newest tokens of each row.

    Args:
        query: ``[B, Hq, n, D]``, the last ``n`` tokens of the rows.
        compressed_keys: Those of the cache, with these tokens appended.
        capacity: Slots of the cache, ``S``; no row is longer.
        scale: Factor on the dot products. Defaults to ``1 / sqrt(D)``.
        key: The cache ``[B, Hkv, S, D]``. Required if ``pool_queries`` is true and ``kernel_size``
            is 1: the keys themselves are then scored.

    Returns:
        int32 ``[B, Hkv, n, W]``, ascending, unused slots last as -1. Blocks count from each row's
        first token; a dense query gets all blocks up to its own.

    Raises:
        ValueError: Shapes do not fit together, or the scale is not positive. A row that is longer
            than ``capacity``, where reading does not wait for a device.
    """
    query = as_autocast(query)
    keys, config = compressed_keys, compressed_keys.config
    if key is not None:
        keys.check_key(key)
    B, Hkv = keys.compressed.shape[:2]
    D = keys.head_dim
    if query.dim() != 4 or query.shape[1] % Hkv or (query.shape[0], query.shape[3]) != (B, D):
        raise ValueError(
            f"query must be [{B}, Hq, n, {D}] with Hq a multiple of {Hkv}, got {list(query.shape)}"
        )
    if capacity < 1:
        raise ValueError(f"capacity must be 1 or more, got {capacity}")
    compressed, coarse = _windows(keys, query)
    width = list_width(config, capacity)
    if config.pool_queries:
        if keys.scores_keys and key is None:
            raise ValueError("key must be the cache where kernel_size is 1, got None")
        if keys.scores_keys and key is not None:
            compressed = key.detach().to(query.dtype)
        return skip_dispatcher(infllm_flex_ops.select_cached_blocks_pooled, query)(
            query.detach(),
            compressed,
            keys.start,
            keys.end,
            *keys.rule.pooled,
            config.dense_len,
            width,
            config.score_dtype == "float8",
        )
    return skip_dispatcher(infllm_flex_ops.select_cached_blocks, query)(
        query.detach(),
        compressed,
        coarse,
        keys.start,
        keys.end,
        *keys.rule,
        config.dense_len,
        width,
        resolve_scale(query, scale),
    )


def list_width(config: InfLLMConfig, capacity: int) -> int:
    """Count the slots of a list: the budget, or all blocks of the longest dense query.

    Args:
        config: Sparsity settings.
        capacity: Tokens of the longest row.
    """
    longest_dense = min(config.dense_len - 1, capacity)
    num_blocks = ceil_div(capacity, config.block_size)
    return max(min(config.num_selected, num_blocks), ceil_div(longest_dense, config.block_size))


def _windows(keys: CompressedKeys, query: Tensor) -> tuple[Tensor, Tensor]:
    """Return the compressed and coarse keys in the dtype of the query, or in float8.

    They differ in dtype if the autocast region was entered after the keys were compressed.
    """
    compressed, coarse = keys.compressed, keys.coarse
    if compressed.dtype in (query.dtype, torch.float8_e4m3fn):
        return compressed, coarse
    return compressed.to(query.dtype), coarse.to(query.dtype)
