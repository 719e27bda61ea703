"""Sparse attention of new tokens over a cache of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllm_flex.chunks import attend_chunk
from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import decode_attention
from infllm_flex.patch.causal_masks import (
    first_visible_slots,
    is_causal_after_padding,
    visible_keys,
)
from infllm_flex.patch.huggingface.cache_updates import compressed_keys_of
from infllm_flex.patch.huggingface.masks import LazyMask
from infllm_flex.patch.huggingface.transformers_private import is_static, plain_mask_arguments
from infllm_flex.patch.layer_state import PatchedLayer
from infllm_flex.patch.running_forward import is_first_to_ask, recall_on_device
from infllm_flex.validation import assert_in_graph

FEW = 16  # queries; more of them gain from sharing the blocks that neighbours select
_MASK = (
    "sparse attention over a cache serves rows that are padded on the left, and no other "
    "attention_mask: put all padding before all tokens (virtual tokens of peft come before it), "
    "or run inside infllm_flex.dense(model)"
)


def attend_cached(
    layer: PatchedLayer,
    cached: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attend from new tokens to a cache.

    Args:
        layer: The record of the attention layer.
        cached: The layer of the cache. `update_static_state` has been called if it is preallocated.
        query: ``[B, Hq, n, D]``.
        key: ``[B, Hkv, S, D]``, as the cache returned them, cut to the slots in use where their
            number is known.
        value: ``[B, Hkv, S, D]``, likewise.
        attention_mask: The mask of ``sdpa_mask``, which `assert_padding_only` has checked; None
            where every query sees all before it.
        scale: Factor on the dot products.

    Returns:
        ``[B, Hq, n, D]``.
    """
    n = query.shape[2]
    static = is_static(cached)
    by_step = _is_step(query, key, value, static)
    if not by_step:
        padding = None if attention_mask is None else visible_keys(attention_mask)[:, 0, -1]
        padding = padding if padding is None else padding.expand(query.shape[0], -1)
        return attend_chunk(query, key, value, layer.config, scale=scale, attention_mask=padding)
    if static:
        keys = cached.infllm_state.compressed_keys
    else:
        start = None if attention_mask is None else _row_starts(attention_mask)
        keys = compressed_keys_of(cached, key, n, start, layer.config)
    return decode_attention(query, key, value, keys, scale=scale)


def assert_padding_only(cached: Any, query: Tensor, mask: Tensor, length: int) -> Tensor:
    """Assert on the device that a mask over a cache is causal after padding on the left.

    The first layer of a forward that asks about a mask checks it.

    Args:
        cached: The layer of the cache.
        query: ``[B, Hq, n, D]``.
        mask: The mask of ``sdpa_mask``, ``[B, 1, n, S]``, with all slots of the cache.
        length: Slots in use, where the cache is not preallocated.

    Returns:
        ``query``, whose values depend on the check.
    """
    if not is_first_to_ask("padding only", mask):
        return query
    end = cached.cumulative_length if is_static(cached) else length
    is_causal = is_causal_after_padding(mask, _row_starts(mask), end)
    return assert_in_graph(query, is_causal, _MASK)


def update_static_state(
    cached: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    config: InfLLMConfig,
) -> int:
    """Bring the compressed keys of a preallocated cache up to date, before any kind of call.

    Returns:
        Number of slots in use. Only a longer prompt, and training, wait for the device to tell it;
        a step of generation gets the capacity of the cache.

    Raises:
        NotImplementedError: A compiled step that needs gradients.
    """
    start = None if attention_mask is None else _row_starts(attention_mask)
    compressed_keys_of(cached, key, query.shape[2], start, config)
    is_step = _is_step(query, key, value, True)
    return key.shape[2] if is_step else int(cached.cumulative_length)


def _row_starts(mask: Tensor) -> Tensor:
    """Where rows begin; the layers of a forward that share a mask scan it once."""
    return recall_on_device("row starts", mask, lambda: first_visible_slots(mask))


def _is_step(query: Tensor, key: Tensor, value: Tensor, static: bool) -> bool:
    """Whether to attend token by token, through the compressed keys that the cache carries."""
    compiled = static and torch.compiler.is_compiling()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        if compiled:
            raise NotImplementedError(
                "sparse attention over a static cache has no gradients in a compiled graph: "
                "run it under torch.no_grad(), or uncompiled"
            )
        return False
    return compiled or query.shape[2] <= FEW


def trim_mask(mask: Tensor | None, query: Tensor, length: int) -> LazyMask | Tensor | None:
    """Cut the mask of a preallocated cache to the slots in use.

    Args:
        mask: The mask of ``sdpa_mask``, ``[B, 1, n, S]``.
        query: ``[B, Hq, n, D]``.
        length: Slots in use. If all of them are new, a causal and padded mask becomes lazy, as it
            would have been without a cache.
    """
    if mask is None:
        return None
    n = query.shape[2]
    mask = mask[..., :length]
    start = first_visible_slots(mask).expand(query.shape[0])
    if length > n or not is_causal_after_padding(mask, start, n):
        return mask
    padding = torch.arange(n, device=mask.device) >= start[:, None]
    return LazyMask(plain_mask_arguments(query.shape[0], n, padding), is_plain=True)
