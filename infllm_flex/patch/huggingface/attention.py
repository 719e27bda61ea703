"""The attention function that transformers calls once per layer of a patched model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from infllm_flex.attention import infllm_attention
from infllm_flex.patch.huggingface.layers import layer_of, previous_implementation
from infllm_flex.patch.huggingface.obstacles import (
    find_obstacle,
    find_position_obstacle,
    guard_compiled,
)
from infllm_flex.patch.layer import PatchedLayer


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend densely, by the layer's previous function, or sparsely: as the number of keys says.

    Args:
        module: The attention layer; its settings are an attribute of it.
        query: ``[B, Hq, Sq, D]``, after the rotary embedding.
        key: ``[B, Hkv, Skv, D]``, with what a cache held before.
        value: ``[B, Hkv, Skv, D]``.
        attention_mask: What ``sdpa_mask`` made: None for plain causal, else ``[B, 1, Sq, Skv]``.
        dropout: Probability; only the dense path has it.
        scaling: Factor of the logits; None for ``D ** -0.5``.
        kwargs: Whatever the model, or its caller, passes to attention functions.

    Returns:
        ``[B, Sq, Hq, D]``, and the attention weights where the previous function returns them.

    Raises:
        NotImplementedError: The sequence is long enough to be sparse, but sparse attention cannot
            serve this call. One line says what came and what to do.
    """
    layer = layer_of(module)
    if layer.attends_densely(key.shape[2]):
        if previous_implementation(module) == "eager":
            attention_mask = _additive_mask(module, query, key, attention_mask)
        return layer.dense_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
    query = _refuse_or_pass(layer, query, key, attention_mask, dropout, kwargs)
    out = infllm_attention(query, key, value, layer.config, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _refuse_or_pass(
    layer: PatchedLayer,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> Tensor:
    """The query, or an error for what cannot be served."""
    positions = kwargs.get("position_ids") if layer.reads_positions else None
    obstacle = find_obstacle(query, key, attention_mask, dropout, kwargs)
    obstacle = obstacle or find_position_obstacle(positions, query.shape[2])
    if obstacle is not None:
        raise NotImplementedError(
            f"sparse attention cannot serve {obstacle} yet: got {key.shape[2]} keys; stay below "
            f"dense_len = {layer.config.dense_len}, or run inside infllm_flex.dense(model)"
        )
    if torch.compiler.is_compiling():
        return guard_compiled(query, attention_mask, positions)
    return query


def _additive_mask(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None
) -> Tensor | None:
    """The floating point mask that ``eager_mask`` would have made, from that of ``sdpa_mask``.

    A model that was eager gets ``sdpa_mask`` while patched, so that a long causal sequence costs no
    ``[S, S]`` mask; short ones make up for it here.
    """
    if attention_mask is None:
        if not getattr(module, "is_causal", True):
            return None
        q_len, kv_len = query.shape[2], key.shape[2]
        # One query stands at the end; more than one without a mask start at the first key.
        first = kv_len - 1 if q_len == 1 else 0
        rows = torch.arange(first, first + q_len, device=query.device)
        attention_mask = rows[None, None, :, None] >= torch.arange(kv_len, device=query.device)
    if attention_mask.dtype is not torch.bool:
        return attention_mask
    zero = torch.zeros((), device=query.device, dtype=query.dtype)
    return torch.where(attention_mask, zero, torch.finfo(query.dtype).min)
