"""Choose the blocks of keys that each query may attend to."""

from __future__ import annotations

import torch
from torch import Tensor

import infllm_flex_ops
from infllm_flex.autocast import as_autocast, attention_dtype
from infllm_flex.batches import lay_out_batch
from infllm_flex.config import InfLLMConfig
from infllm_flex_ops.selection.pool_queries import round_to_float8
from infllm_flex_ops.selection.rule import SelectionRule

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 256


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
    """Pick the best blocks of every query, shared by the query heads of a group.

    Args:
        query: ``[B, Hq, Sq, D]``, after the rotary embedding (before it for ``use_nope`` models);
            the last ``Sq`` positions of the sequence.
        key: ``[B, Hkv, Skv, D]``, alike; ``Hkv`` divides ``Hq``.
        config: Sparsity settings. ``dense_len`` plays no part here.
        scale: Factor on the dot products. Defaults to ``1 / sqrt(D)``.
        attention_mask: ``[B, Skv]``, bool or integer, 1 for real tokens, which are one run per row.
        cu_seqlens: int32 ``[N + 1]``: documents packed along S start at all but the last, which is
            S; B is 1 and Sq = Skv.

    Returns:
        Selected blocks, int32 ``[B, Hkv, Sq, K]`` with ``K = min(num_selected, Nkv)``, ascending,
        unused slots last as -1. Blocks count from the first token of the query's own sequence; a
        query that is padding selects none. No gradient flows through the choice.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together; a mask with gaps or bounds that
            do not ascend to S, where that can be told without waiting for a device.

    Source: arXiv 2509.24663, section 3.
    """
    query, key = as_autocast(query), as_autocast(key)
    check_query_and_key(query, key)
    scale = default_scale(query) if scale is None else scale
    layout = lay_out_batch(query, key, config, attention_mask, cu_seqlens)
    if layout is None:
        return choose_blocks(query, key, config, scale)
    q_len, kv_len = query.shape[2], key.shape[2]
    documents = layout.documents(config)
    query, key = layout.move_queries(query), layout.move_keys(key)
    selected = choose_blocks(query, key, config, scale, documents)
    selected = layout.move_back(selected, q_len, fill=-1)
    selected = selected[..., : (kv_len + config.block_size - 1) // config.block_size]
    first_block = layout.first_block(config.block_size, q_len)[:, None, :, None]
    return torch.where(selected < 0, -1, selected - first_block)


@torch.no_grad()
def choose_blocks(
    query: Tensor,
    key: Tensor,
    config: InfLLMConfig,
    scale: float,
    documents: Tensor | None = None,
    num_slots: int | None = None,
) -> Tensor:
    """Pick blocks of a sequence, or of a layout's ``documents``.

    Args:
        query: ``[B, Hq, Sq, D]``, the last ``Sq`` positions.
        key: ``[B, Hkv, Skv, D]``.
        config: Sparsity settings.
        scale: Factor on the dot products.
        documents: The table of ``Layout.documents``.
        num_slots: The largest budget in it; by default that of the settings.

    Returns:
        int32 ``[B, Hkv, Sq, K]``, in blocks of ``key``.
    """
    query, key = query.detach(), key.detach()
    rule = selection_rule(config, num_slots)
    if config.pool_queries:
        return infllm_flex_ops.select_blocks_pooled(
            infllm_flex_ops.pool_queries(query, key.shape[1], config.score_dtype == "float8"),
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


def compress_for_pooled(key: Tensor, config: InfLLMConfig) -> Tensor:
    """Make the compressed keys that pooled queries are multiplied with.

    Args:
        key: ``[B, Hkv, S, D]``.
        config: Sparsity settings; ``kernel_size`` and ``score_dtype`` count.

    Returns:
        ``[B, Hkv, C, D]``; for windows of one key in the same dtype the keys themselves.
    """
    if config.kernel_size > 1:
        key = infllm_flex_ops.compress_keys(key, config.kernel_size, config.kernel_stride)
    return key if config.score_dtype == "same" else round_to_float8(key)


def default_scale(query: Tensor) -> float:
    """Scale dot products by ``1 / sqrt(D)``."""
    return float(query.shape[-1]) ** -0.5


def check_query_and_key(query: Tensor, key: Tensor) -> None:
    """Raise a ValueError unless the shapes, dtypes and devices of the two fit together."""
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [B, H, S, D], got shape {tuple(tensor.shape)}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            f"query and key must have one batch size, got {query.shape[0]} and {key.shape[0]}"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of key heads, got {query.shape[1]} and {key.shape[1]}"
        )
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            f"query must not be longer than key, whose last positions it holds, "
            f"got {query.shape[2]} and {key.shape[2]}"
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and key must have one head dim, got {query.shape[3]} and {key.shape[3]}"
        )
    if query.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"head dim must be at most {MAX_HEAD_DIM}, got {query.shape[3]}")
    if query.dtype not in _DTYPES:
        raise ValueError(f"query must be floating point, got {query.dtype}")
    if query.dtype != key.dtype and attention_dtype(query) != attention_dtype(key):
        raise ValueError(f"query and key must have one dtype, got {query.dtype} and {key.dtype}")
    if query.device != key.device:
        raise ValueError(
            f"query and key must be on one device, got {query.device} and {key.device}"
        )
