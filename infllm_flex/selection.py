"""Select the blocks of keys that each query may attend to."""

from __future__ import annotations

import torch
from torch import Tensor

import infllm_flex_ops
from infllm_flex.autocast import attention_dtype
from infllm_flex.batches import lay_out_batch
from infllm_flex.config import InfLLMConfig
from infllm_flex.validation import prepare_selection
from infllm_flex_ops.device import FLOAT8_CAPABILITY, device_capability
from infllm_flex_ops.selection.pool_queries import round_to_float8
from infllm_flex_ops.selection.rotary_dims import slowest_dims
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.sizes import ceil_div


@torch.no_grad()
def select_blocks(
    query: Tensor,
    key: Tensor,
    config: InfLLMConfig,
    *,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Select the best blocks of every query, the same for the query heads of a group.

    Args:
        query: ``[B, Hq, Sq, D]``, after the rotary embedding (before it for ``use_nope`` models);
            the last ``Sq`` positions of the sequence.
        key: ``[B, Hkv, Skv, D]``, likewise; ``Hkv`` divides ``Hq``.
        config: Sparsity settings. ``dense_len`` is not used here.
        scale: Factor on the dot products, positive. Defaults to ``1 / sqrt(D)``.
        attention_mask: ``[B, Skv]``, bool or integer, 1 for real tokens, which are one run per row.
        cu_seqlens: int32 ``[N + 1]``: documents packed along S start at all but the last, which is
            S; B is 1 and Sq = Skv.

    Returns:
        Selected blocks, int32 ``[B, Hkv, Sq, K]`` with ``K = min(num_selected, Nkv)``, ascending,
        unused slots last as -1. Blocks count from the first token of the query's own sequence; a
        query that is padding selects none. No gradient flows through the selection.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the scale is not positive. A
            mask with gaps, or bounds that do not ascend to S, raise it where finding out needs no
            wait for a device.

    Source: arXiv 2509.24663, section 3.
    """
    query, key, scale = prepare_selection(query, key, scale)
    q_len, kv_len = query.shape[2], key.shape[2]
    layout = lay_out_batch(key, q_len, config, attention_mask, cu_seqlens)
    if layout is None:
        return select_blocks_unchecked(query, key, config, scale)
    documents = layout.documents(config)
    query, key = layout.move_queries(query), layout.move_keys(key)
    selected = select_blocks_unchecked(query, key, config, scale, documents)
    selected = layout.move_back(selected, q_len, fill=-1)
    selected = selected[..., : ceil_div(kv_len, config.block_size)]
    start_block = layout.start_block(config.block_size, q_len)[:, None, :, None]
    return torch.where(selected < 0, -1, selected - start_block)


@torch.no_grad()
def select_blocks_unchecked(
    query: Tensor,
    key: Tensor,
    config: InfLLMConfig,
    scale: float,
    documents: Tensor | None = None,
    num_slots: int | None = None,
) -> Tensor:
    """Select blocks of a sequence, or of a layout's ``documents``, without checking the inputs.

    Args:
        query: ``[B, Hq, Sq, D]``, the last ``Sq`` positions.
        key: ``[B, Hkv, Skv, D]``.
        config: Sparsity settings.
        scale: Factor on the dot products.
        documents: The table of ``Layout.documents``.
        num_slots: The largest budget in that table; defaults to the budget of the settings.

    Returns:
        int32 ``[B, Hkv, Sq, K]``, in blocks of ``key``.
    """
    query, key = query.detach(), key.detach()
    rule = selection_rule(config, num_slots)
    if config.pool_queries:
        return infllm_flex_ops.select_blocks_pooled(
            pool_queries(query, key.shape[1], config),
            compress_for_pooled(key, config),
            key.shape[2],
            *rule.pooled,
            documents,
        )
    compressed = coarse = infllm_flex_ops.compress_keys(key, *rule.windows)
    if rule.coarse_windows != rule.windows:
        coarse = infllm_flex_ops.compress_keys(key, *rule.coarse_windows)
    return infllm_flex_ops.select_blocks(
        query, compressed, coarse, key.shape[2], *rule, scale, documents
    )


def selection_rule(config: InfLLMConfig, num_selected: int | None = None) -> SelectionRule:
    """Make the settings that decide which blocks a query selects, as the operators take them.

    Args:
        config: Sparsity settings.
        num_selected: Another budget in blocks than that of the settings.
    """
    coarse_size, coarse_stride = config.coarse_size, config.coarse_stride
    if config.lse == "exact":
        coarse_size, coarse_stride = config.kernel_size, config.kernel_stride
    return SelectionRule(
        config.kernel_size,
        config.kernel_stride,
        coarse_size,
        coarse_stride,
        config.block_size,
        config.init_blocks,
        config.local_blocks,
        config.num_selected if num_selected is None else num_selected,
    )


def count_score_products(config: InfLLMConfig, num_heads: int, num_kv_heads: int) -> float:
    """Count the dot products by which a query is scored, per token of its past.

    Args:
        config: Sparsity settings.
        num_heads: ``Hq``.
        num_kv_heads: ``Hkv``.

    Returns:
        Products of all heads: of each query head, or of each group's mean query, with the
        compressed keys, and with the coarse keys where these normalise the scores.
    """
    return (num_kv_heads if config.pool_queries else num_heads) * count_scored_keys(config)


def count_scored_keys(config: InfLLMConfig) -> float:
    """Count the compressed keys, and the coarse keys that normalise, per token of a sequence."""
    coarse = 1 / config.coarse_stride if config.uses_coarse_keys else 0.0
    return 1 / config.kernel_stride + coarse


def pool_queries(query: Tensor, num_kv_heads: int, config: InfLLMConfig) -> Tensor:
    """Make the pooled queries of ``query [B, Hq, S, D]``: ``[B, Hkv, S, num_score_dims]``."""
    num_dims = config.num_score_dims(query.shape[-1])
    float8 = config.score_dtype == "float8"
    return infllm_flex_ops.pool_queries(query, num_kv_heads, float8, num_dims)


def dtype_of_compressed(key: Tensor, config: InfLLMConfig) -> torch.dtype:
    """Dtype in which the compressed keys of a cache are kept beside it.

    Those that are multiplied in float8 are kept so if they are a copy of few dims, which is then a
    fraction of the cache. A cache that autocast casts where it is read keeps the dtype of the cast.

    Args:
        key: The cache.
        config: Sparsity settings.
    """
    dtype = attention_dtype(key)
    if not config.score_dims or dtype != key.dtype:
        return dtype
    return dtype_of_slowest(dtype, config, key.device)


def dtype_of_slowest(dtype: torch.dtype, config: InfLLMConfig, device: torch.device) -> torch.dtype:
    """Do the same for a cache of this dtype, on this device, with ``score_dims``."""
    keeps_float8 = device.type != "cuda" or device_capability(device) >= FLOAT8_CAPABILITY
    return torch.float8_e4m3fn if config.score_dtype == "float8" and keeps_float8 else dtype


def compress_for_pooled(key: Tensor, config: InfLLMConfig) -> Tensor:
    """Make the compressed keys that pooled queries are multiplied with.

    Args:
        key: ``[B, Hkv, S, D]``.
        config: Sparsity settings, of which ``kernel_size``, ``score_dtype`` and ``score_dims`` are
            used.

    Returns:
        ``[B, Hkv, C, num_score_dims]``; the keys themselves for windows of one key in the same
        dtype and all dims.
    """
    key = slowest_dims(key, config.num_score_dims(key.shape[-1]))
    if config.kernel_size > 1:
        key = infllm_flex_ops.compress_keys(key, config.kernel_size, config.kernel_stride)
    return key if config.score_dtype == "same" else round_to_float8(key)
