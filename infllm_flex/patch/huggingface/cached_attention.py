"""Attention of new tokens over a cache, as transformers asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllm_flex.chunks import attend_chunk
from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import decode_attention
from infllm_flex.patch.causal_masks import adds_to_logits
from infllm_flex.patch.huggingface.cache_state import compressed_keys_of, is_static
from infllm_flex.patch.huggingface.masks import LazyMask
from infllm_flex.patch.layer_state import PatchedLayer
from infllm_flex_ops import zero_if

_FEW = 16  # queries; more of them gain from sharing the blocks that neighbours select
_MASK = (
    "sparse attention over a cache serves rows that are padded on the left, alike at every step, "
    "and no other attention_mask"
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
    """Attend from new tokens to a cache: ``[B, Hq, n, D]``.

    Args:
        layer: The record of the attention layer.
        cached: The layer of the cache; `update_static_state` has seen it if it is preallocated.
        query: ``[B, Hq, n, D]``.
        key: ``[B, Hkv, S, D]``, as the cache returned them, as many as there are where that is
            known.
        value: ``[B, Hkv, S, D]``, alike.
        attention_mask: As ``sdpa_mask`` made it; None where all see all that is before them.
        scale: Factor on the dot products.
    """
    n, start = query.shape[2], None
    through_state = _is_step(query, key, value, cached)
    preallocated = through_state and is_static(cached)
    if attention_mask is not None:
        start = first_visible_slots(attention_mask, key)
        if layer.reads_positions:
            end = cached.cumulative_length if preallocated else key.shape[2]
            query = query + zero_if(_is_causal(attention_mask, start, end), _MASK)
    if not through_state:
        padding = None if attention_mask is None else _visible(attention_mask)[:, -1]
        padding = padding if padding is None else padding.expand(query.shape[0], -1)
        return attend_chunk(query, key, value, layer.config, scale=scale, attention_mask=padding)
    if preallocated:
        keys = cached.infllm_state.compressed_keys
    else:
        keys = compressed_keys_of(cached, key, n, start, layer.config)
    return decode_attention(query, key, value, keys, scale=scale)


def update_static_state(
    cached: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    config: InfLLMConfig,
) -> int:
    """Bring the state of a preallocated cache up to date, whatever the call then attends to.

    Returns:
        How many keys there are. Only a longer prompt, and training, wait for the device to tell; a
        step of generation takes the cache's capacity for it.

    Raises:
        NotImplementedError: A compiled step that needs gradients.
    """
    start = None if attention_mask is None else first_visible_slots(attention_mask, key)
    compressed_keys_of(cached, key, query.shape[2], start, config)
    is_step = _is_step(query, key, value, cached)
    return key.shape[2] if is_step else int(cached.cumulative_length)


def _is_step(query: Tensor, key: Tensor, value: Tensor, cached: Any) -> bool:
    """Whether to go through the compressed keys that the cache carries, token by token."""
    compiled = is_static(cached) and torch.compiler.is_compiling()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        if compiled:
            raise NotImplementedError(
                "sparse attention over a static cache has no gradients in a compiled graph: "
                "run it under torch.no_grad(), or uncompiled"
            )
        return False
    return compiled or query.shape[2] <= _FEW


def trim_mask(mask: Tensor | None, query: Tensor, length: int) -> LazyMask | Tensor | None:
    """Cut the mask of a preallocated cache to the keys that there are.

    Args:
        mask: As ``sdpa_mask`` made it, ``[B, 1, n, S]``.
        query: ``[B, Hq, n, D]``.
        length: Keys that there are; if they are all new, a causal and padded mask turns lazy, as it
            would have been without a cache.
    """
    if mask is None:
        return None
    from transformers.masking_utils import causal_mask_function

    n = query.shape[2]
    mask = mask[..., :length]
    start = first_visible_slots(mask, query)
    if length > n or not _is_causal(mask, start, n):
        return mask
    arguments = {
        "batch_size": query.shape[0],
        "q_length": n,
        "kv_length": n,
        "mask_function": causal_mask_function,
        "attention_mask": torch.arange(n, device=mask.device) >= start[:, None],
        "device": mask.device,
    }
    return LazyMask(arguments, is_plain=True)


def first_visible_slots(mask: Tensor, key: Tensor) -> Tensor:
    """Where each row's tokens begin, by what its last query sees: int64 ``[B]``.

    Args:
        mask: As ``sdpa_mask`` made it, ``[B, 1, n, S]``.
        key: ``[B, H, S, D]``.
    """
    B, _, S, _ = key.shape
    visible = _visible(mask)[:, -1]
    return torch.where(visible.any(-1), visible.int().argmax(-1), S).expand(B)


def _is_causal(mask: Tensor, start: Tensor, end: Tensor | int) -> Tensor:
    """Whether a mask lets every query see its row from slot ``start`` up to itself: bool ``[]``.

    A mask that adds to logits, or differs by head, does more than that.
    """
    n, S = mask.shape[2:]
    slot = torch.arange(S, device=mask.device)
    own = torch.arange(-n, 0, device=mask.device) + end
    expected = (slot >= start[:, None, None]) & (slot <= own[:, None])
    plain = (_visible(mask) == expected).all()
    if mask.dtype is not torch.bool:
        plain &= ~adds_to_logits(mask)
    return plain if mask.shape[1] == 1 else plain & (mask == mask[:, :1]).all()


def _visible(mask: Tensor) -> Tensor:
    """Which keys a mask lets a query see: bool ``[B, n, S]``."""
    return (mask if mask.dtype is torch.bool else mask == 0)[:, 0]
