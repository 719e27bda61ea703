"""Refuse calls that are long enough to be sparse but that sparse attention cannot serve.

A call that is overlooked here gets a silently wrong answer.
"""

from __future__ import annotations

from torch import Tensor

from infllm_flex.patch.causal_masks import is_plain_causal
from infllm_flex.patch.head_dims import unsupported_head_dims
from infllm_flex.patch.huggingface.attention_call import AttentionCall
from infllm_flex.patch.huggingface.documents import Sequences
from infllm_flex.patch.huggingface.mask_verdicts import isolates_documents
from infllm_flex.patch.huggingface.masks import LazyMask
from infllm_flex.patch.running_forward import recall
from infllm_flex.validation import assert_in_graph, has_values, is_recorded

# Keywords by which models pass attention that is more than softmax(scale * q k) v.
_SPECIAL_KEYWORDS = {
    "softcap": "soft-capped logits",
    "s_aux": "learned attention sinks",
    "sinks": "learned attention sinks",
    "position_bias": "a position bias",
    "indices": "the model's own sparse selection",
    "block_indices": "the model's own sparse selection",
}
_INSTEAD = "stay below dense_len, or run inside infllm_flex.dense(model)"
_MASK = "an attention mask beyond causal, padded and packed (a 4-D mask, prefixes, blocks)"


def reject_unsupported_decode(call: AttentionCall) -> None:
    """Raise a NotImplementedError for new tokens over a cache that cannot be sparse.

    `attend_cached` judges the mask.
    """
    reason = _unsupported_arguments(call)
    if reason is None and call.kwargs.get("cu_seq_lens_q") is not None:
        reason = "packed documents over a cache"
    _reject(call, reason)


def reject_unsupported_paged(call: AttentionCall) -> None:
    """Raise a NotImplementedError for a step of continuous batching that cannot be sparse."""
    # The keyword says that a mask keeps the requests apart, within which attention is causal.
    call.kwargs.pop("is_causal", None)
    reason = _unsupported_arguments(call)
    if reason is None and is_recorded(call.query):
        reason = "continuous batching in a CUDA graph (pass use_cuda_graph=False)"
    _reject(call, reason)


def reject_unsupported_prefill(
    call: AttentionCall, sequences: Sequences | None, positions: Tensor | None
) -> None:
    """Raise a NotImplementedError for a call without earlier keys that cannot be sparse.

    Args:
        call: The call. `assert_supported_mask` judges its mask where values cannot be read.
        sequences: Sequences of the batch; None for one per row.
        positions: ``[1 or B, Sq]``, where the call has any.
    """
    reason = _unsupported_arguments(call)
    num_queries, mask = call.query.shape[2], call.mask
    if reason is None and num_queries != call.key.shape[2]:
        reason = f"keys that no layer of a transformers cache holds ({num_queries} queries)"
    if reason is None and mask is not None and _can_read(call.query):
        if isinstance(mask, LazyMask):
            served = mask.is_plain or mask.judge_once(
                positions, lambda: isolates_documents(mask, call.query, sequences, positions)
            )
            served = served and not mask.is_edited()
        else:
            served = recall("plain causal", (mask,), lambda: bool(is_plain_causal(mask)))
        reason = None if served else _MASK
    _reject(call, reason)


def assert_supported_mask(
    call: AttentionCall, sequences: Sequences | None, positions: Tensor | None
) -> Tensor:
    """Put the check of the mask into a graph, where its values cannot be read.

    Returns:
        The query; in a graph its values depend on the check, so that no pass removes it.
    """
    query, mask = call.query, call.mask
    if _can_read(query) or mask is None or (isinstance(mask, LazyMask) and mask.is_plain):
        return query
    if isinstance(mask, LazyMask):
        served = isolates_documents(mask, query, sequences, positions)
    else:
        served = is_plain_causal(mask)
    text = f"sparse attention cannot serve {_MASK} yet: {_INSTEAD}"
    return assert_in_graph(query, served, text)


def _reject(call: AttentionCall, reason: str | None) -> None:
    if reason is not None:
        raise NotImplementedError(
            f"sparse attention cannot serve {reason} yet: got {call.key.shape[2]} keys; stay below "
            f"dense_len = {call.layer.config.dense_len}, or run inside infllm_flex.dense(model)"
        )


def _unsupported_arguments(call: AttentionCall) -> str | None:
    """Name an argument other than the mask that cannot be served; None if there is none."""
    reason = unsupported_head_dims(call.key.shape[3], call.value.shape[3])
    if reason is not None:
        return reason
    window = call.kwargs.get("sliding_window")
    if window is not None and window < call.key.shape[2]:
        return "a sliding window"
    for keyword, meaning in _SPECIAL_KEYWORDS.items():
        if call.kwargs.get(keyword) is not None:
            return meaning
    if call.kwargs.get("output_attentions"):
        return "attention weights (output_attentions=True)"
    is_causal = call.kwargs.get("is_causal")
    # transformers lets the keyword precede the layer's attribute, which may change after patching.
    if not (getattr(call.module, "is_causal", True) if is_causal is None else is_causal):
        return "attention that is not causal"
    if call.dropout > 0:
        return f"attention dropout ({call.dropout:g})"
    return None


def _can_read(x: Tensor) -> bool:
    return not is_recorded(x) and has_values(x)
