"""The attention function that transformers calls once per layer of a patched model."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from infllm_flex.attention import attend_in_layout, infllm_attention
from infllm_flex.autocast import attend_outside_autocast
from infllm_flex.patch.huggingface.attention_call import (
    AttentionCall,
    Kind,
    Output,
    is_dense_step,
)
from infllm_flex.patch.huggingface.cache_hook import KEYWORD, take_cache
from infllm_flex.patch.huggingface.cached_attention import assert_padding_only, attend_cached
from infllm_flex.patch.huggingface.dense_attention import attend_by_previous, attend_dense
from infllm_flex.patch.huggingface.documents import find_sequences
from infllm_flex.patch.huggingface.instance_forward import record_call
from infllm_flex.patch.huggingface.layer_records import get_or_make_layer
from infllm_flex.patch.huggingface.masks import LazyMask, materialize
from infllm_flex.patch.huggingface.paged_attention import (
    attend_requests,
    read_requests,
    warn_of_other_rule,
)
from infllm_flex.patch.huggingface.sequence_info import reject_recompute_without_info
from infllm_flex.patch.huggingface.transformers_private import paged_step, update_pages
from infllm_flex.patch.huggingface.unsupported_calls import (
    assert_supported_mask,
    reject_unsupported_decode,
    reject_unsupported_paged,
    reject_unsupported_prefill,
)
from infllm_flex.patch.layer_state import Attend, get_layer


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
) -> Output:
    """Attend densely, by the layer's previous function, or sparsely, as the number of keys decides.

    Documents packed by ``cu_seq_lens_q`` or by ``position_ids`` that restart never see each other,
    densely or sparsely, whether or not transformers made a mask for them.

    Args:
        module: The attention layer; its settings are an attribute of it.
        query: ``[B, Hq, Sq, D]``, after the rotary embedding.
        key: ``[B, Hkv, Skv, D]``, including what a cache held before.
        value: ``[B, Hkv, Skv, D]``.
        attention_mask: The result of ``causal_mask``: None for plain causal, else lazy, or
            ``[B, 1, Sq, Skv]``.
        dropout: Probability; only the dense path has it.
        scaling: Factor of the logits; None for ``D ** -0.5``.
        infllm_previous: The attention implementation of short sequences. It is an argument because
            reading it from the config would take microseconds per call.
        kwargs: Whatever the model, or its caller, passes to attention functions.

    Returns:
        ``[B, Sq, Hq, D]``, and the attention weights where the previous function returns them.

    Raises:
        NotImplementedError: The sequence is long enough to be sparse, but sparse attention cannot
            serve this call. One line says what came and what to do.
    """
    layer = get_layer(module)
    is_first = layer is None
    if layer is None:
        layer = get_or_make_layer(module)
    if not torch.compiler.is_compiling() and "forward" in vars(module):
        record_call(module)
    if infllm_previous == "sdpa" and is_dense_step(layer, query, key, kwargs):
        # Most calls of a generation. The rest of this function would be overhead for them.
        kwargs.pop(KEYWORD, None)
        return layer.dense_attention[infllm_previous](
            module,
            query,
            key,
            value,
            None if attention_mask is None else materialize(attention_mask),
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
    call = AttentionCall(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout,
        scaling,
        infllm_previous,
        kwargs,
        layer,
        is_first,
        take_cache(module, kwargs),
    )
    kind = call.classify()
    if layer.observe is not None:
        out, weights = _ATTEND[kind](call)
        return layer.observe(out, query, key, scaling), weights
    if kind is Kind.DENSE:
        return attend_dense(call)
    if kind is Kind.DECODE:
        return attend_decode(call)
    if kind is Kind.PREFILL:
        return attend_prefill(call)
    if kind is Kind.PAGED:
        return attend_paged(call)
    return attend_overridden(call)


# The registered function of models that were eager before.
attention_forward_of_eager = functools.partial(attention_forward, infllm_previous="eager")


def attend_overridden(call: AttentionCall) -> Output:
    """Attend by the function that ``attend_through`` gave the layer."""
    assert call.layer.attend is not None
    return _attend(call.layer.attend, call.query, call.key, call.value, call.scale)


def attend_decode(call: AttentionCall) -> Output:
    """Attend sparsely from new tokens to a cache."""
    given = materialize(call.mask)
    call.drop_unused_slots()
    reject_unsupported_decode(call)
    query, mask = call.query, materialize(call.mask)
    if given is not None:
        query = assert_padding_only(call.cached, query, given, call.length)
    out = attend_cached(call.layer, call.cached, query, call.key, call.value, mask, call.scale)
    return out.transpose(1, 2).contiguous(), None


def attend_prefill(call: AttentionCall) -> Output:
    """Attend sparsely where all keys are those of this call."""
    call.drop_unused_slots()
    info = call.read_sequence_info()
    sequences = find_sequences(call.query, info)
    reject_recompute_without_info(call.layer, info, sequences is not None)
    reject_unsupported_prefill(call, sequences, info.positions)
    query = assert_supported_mask(call, sequences, info.positions)
    config = call.layer.config

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        if sequences is None:
            return infllm_attention(q, k, v, config, scale=scale)
        return attend_in_layout(q, k, v, config, sequences.layout(config), scale=scale)

    return _attend(attend, query, call.key, call.value, call.scale)


def attend_paged(call: AttentionCall) -> Output:
    """Attend within each request of a step of continuous batching."""
    call.key, call.value = update_pages(call.module, call.key, call.value, call.kwargs)
    if call.layer.attends_densely(paged_step(call.kwargs).longest):
        return attend_by_previous(call, None)  # the mask isolates the requests
    reject_unsupported_paged(call)
    requests, config = read_requests(call.kwargs), call.layer.config
    warn_of_other_rule(config)

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return attend_requests(q, k, v, requests, config, scale)

    return _attend(attend, call.query, call.key, call.value, call.scale)


def _attend(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> Output:
    out = attend_outside_autocast(attend, query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


_ATTEND = {
    Kind.OVERRIDDEN: attend_overridden,
    Kind.DENSE: attend_dense,
    Kind.DECODE: attend_decode,
    Kind.PREFILL: attend_prefill,
    Kind.PAGED: attend_paged,
}
