"""The attention function that transformers calls once per layer of a patched model."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from infllm_flex.attention import attend_in_layout, infllm_attention
from infllm_flex.autocast import as_autocast
from infllm_flex.patch.head_dims import unsupported_head_dims
from infllm_flex.patch.huggingface.attention_layers import layer_of
from infllm_flex.patch.huggingface.cache_hook import KEYWORD, cache_layer
from infllm_flex.patch.huggingface.cache_state import is_static
from infllm_flex.patch.huggingface.cached_attention import (
    attend_cached,
    trim_mask,
    update_static_state,
)
from infllm_flex.patch.huggingface.documents import Sequences, find_sequences
from infllm_flex.patch.huggingface.instance_forward import record_call
from infllm_flex.patch.huggingface.masks import LazyMask, materialize
from infllm_flex.patch.huggingface.sequence_info import (
    NO_INFO,
    assert_single_document,
    read_sequence_info,
    reject_recompute_without_info,
)
from infllm_flex.patch.huggingface.unsupported_calls import (
    AttentionCall,
    assert_supported_in_graph,
    find_unsupported,
)
from infllm_flex.patch.layer_state import Attend, PatchedLayer, get_layer
from infllm_flex.patch.skip_reasons import CHUNKED
from infllm_flex.validation import is_recorded, require_rows

_CHUNKS = (
    "documents over a cache must not begin within the chunks of a layer of chunked attention: "
    "pass use_cache=False"
)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    infllm_previous: str = "sdpa",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend densely, by the layer's previous function, or sparsely: as the number of keys says.

    Documents packed by ``cu_seq_lens_q`` or by ``position_ids`` that restart never see each other,
    densely or sparsely, whether or not transformers made a mask for them.

    Args:
        module: The attention layer; its settings are an attribute of it.
        query: ``[B, Hq, Sq, D]``, after the rotary embedding.
        key: ``[B, Hkv, Skv, D]``, with what a cache held before.
        value: ``[B, Hkv, Skv, D]``.
        attention_mask: What ``causal_mask`` made: None for plain causal, else lazy, or
            ``[B, 1, Sq, Skv]``.
        dropout: Probability; only the dense path has it.
        scaling: Factor of the logits; None for ``D ** -0.5``.
        infllm_previous: The attention implementation of short sequences; not read from the config,
            where every look-up takes microseconds.
        kwargs: Whatever the model, or its caller, passes to attention functions.

    Returns:
        ``[B, Sq, Hq, D]``, and the attention weights where the previous function returns them.

    Raises:
        NotImplementedError: The sequence is long enough to be sparse, but sparse attention cannot
            serve this call. One line says what came and what to do.
    """
    is_new = get_layer(module) is None
    layer = layer_of(module)
    if not torch.compiler.is_compiling() and "forward" in vars(module):
        record_call(module)
    if layer.attend is not None:
        return _attend(layer.attend, query, key, value, scaling)
    cached = cache_layer(kwargs.pop(KEYWORD, None), module, key)
    length = key.shape[2]
    if is_static(cached) and layer.ever_attends_sparsely(length):
        attention_mask = materialize(attention_mask)
        length = update_static_state(cached, query, key, value, attention_mask, layer.config)
    sequences, is_dense = None, layer.attends_densely(length)
    if is_new and not is_dense and query.shape[2] != length:
        raise NotImplementedError(
            "sparse attention cannot serve a cache that is preallocated, or filled before, in the "
            "first call of a model that only names it as its attn_implementation: call "
            "infllm_flex.patch_model(model) first"
        )

    def attend_densely(sequences: Sequences | None) -> tuple[Tensor, Tensor | None]:
        mask = _dense_mask(attention_mask, sequences, layer)
        if infllm_previous == "eager":
            mask = _additive_mask(module, query, key, mask)
        return layer.dense_attention[infllm_previous](
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )

    # Mostly there is one sequence per row: what follows from that keeps the device busy until it is
    # known. Not in training, where autograd would record what is in vain.
    speculative_output: list[tuple[Tensor, Tensor | None]] = []
    may_guess = is_dense and dropout == 0.0 and not torch.is_grad_enabled()
    info = NO_INFO
    if query.shape[2] > 1 and getattr(module, "is_causal", True):
        info = read_sequence_info(query, key, attention_mask, kwargs, layer)
        lone = info.positions_only if _is_plain(attention_mask) else None
        if is_dense and lone is not None and is_recorded(query):
            if layer.reads_positions:  # one layer checks for all: they get the same
                query = assert_single_document(query, lone)
        else:
            overlap = (
                (lambda: speculative_output.append(attend_densely(None))) if may_guess else None
            )
            sequences = find_sequences(query, info, overlap)
            reject_recompute_without_info(layer, info, sequences)
    if is_dense:
        return (
            speculative_output[0]
            if speculative_output and sequences is None
            else attend_densely(sequences)
        )
    decoding = cached is not None and query.shape[2] < length
    if length < key.shape[2]:  # a preallocated cache, and how far it is filled
        key, value = key[:, :, :length], value[:, :, :length]
        attention_mask = trim_mask(materialize(attention_mask), query, length)
        info = read_sequence_info(query, key, attention_mask, kwargs)
        sequences = find_sequences(query, info)
    call = AttentionCall(query, key, attention_mask, sequences, info.positions)
    obstacle = unsupported_head_dims(key.shape[3], value.shape[3])
    obstacle = obstacle or find_unsupported(call, dropout, kwargs, decoding)
    if obstacle is not None:
        raise NotImplementedError(
            f"sparse attention cannot serve {obstacle} yet: got {key.shape[2]} keys; stay below "
            f"dense_len = {layer.config.dense_len}, or run inside infllm_flex.dense(model)"
        )
    if decoding:
        mask = materialize(attention_mask)
        out = attend_cached(layer, cached, query, key, value, mask, scaling)
        return out.transpose(1, 2).contiguous(), None
    query = assert_supported_in_graph(call)

    def sparse(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        if sequences is None:
            return infllm_attention(q, k, v, layer.config, scale=scale)
        layout = sequences.layout(layer.config)
        return attend_in_layout(q, k, v, layer.config, layout, scale=scale)

    return _attend(sparse, query, key, value, scaling)


# For models that were eager.
attention_forward_of_eager = functools.partial(attention_forward, infllm_previous="eager")


def _attend(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> tuple[Tensor, None]:
    """Call ``attend`` in the precision that ``torch.autocast`` asks for, as SDPA would be.

    The rotary embedding leaves queries and keys in that of the weights. Inside nothing more is
    cast: scores stay float32.
    """
    device = query.device.type
    if not query.is_meta and torch.is_autocast_enabled(device):
        query, key, value = (as_autocast(x) for x in (query, key, value))
        with torch.autocast(device, enabled=False):
            out = attend(query, key, value, scale)
    else:
        out = attend(query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


def _is_plain(mask: LazyMask | Tensor | None) -> bool:
    """Whether a mask tells nothing but causal, before any value is read."""
    return mask is None or (isinstance(mask, LazyMask) and mask.is_plain and mask.padding is None)


def _dense_mask(
    mask: LazyMask | Tensor | None, sequences: Sequences | None, layer: PatchedLayer
) -> Tensor | None:
    """The mask for the layer's previous function."""
    tensor = materialize(mask)
    if sequences is None:
        return tensor
    isolated = sequences.isolate(tensor)
    in_chunks = layer.skip_reason == CHUNKED and tensor is not None and tensor.dtype is torch.bool
    if in_chunks and isolated is not None:
        # Such a mask must have been made for these documents, whose chunks begin where they do.
        apart = (isolated == tensor) | ~sequences.is_real[:, None, :, None]
        isolated = require_rows(apart.flatten(1).all(-1), _CHUNKS, isolated)
    return isolated


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
