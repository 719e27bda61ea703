"""Attention below ``dense_len``: the layer's previous function, with documents isolated."""

from __future__ import annotations

import torch
from torch import Tensor

from infllm_flex.patch.huggingface.attention_call import AttentionCall, Output
from infllm_flex.patch.huggingface.documents import Sequences, find_sequences
from infllm_flex.patch.huggingface.masks import LazyMask, materialize
from infllm_flex.patch.huggingface.sequence_info import (
    assert_single_document,
    reject_recompute_without_info,
)
from infllm_flex.patch.huggingface.speculation import Speculation
from infllm_flex.patch.layer_state import PatchedLayer
from infllm_flex.patch.running_forward import is_first_to_ask
from infllm_flex.patch.skip_reasons import CHUNKED, OTHER_ATTENTION
from infllm_flex.validation import is_recorded, require_rows

_CHUNKS = (
    "documents over a cache must not begin within the chunks of a layer of chunked attention: "
    "pass use_cache=False"
)


def attend_dense(call: AttentionCall) -> Output:
    """Attend by the layer's previous function. Bits are unchanged where a row is one document."""
    info = call.read_sequence_info()
    if info.is_empty:
        reject_recompute_without_info(call.layer, info, has_documents=False)
        return attend_by_previous(call, None)
    recorded = is_recorded(call.query)
    positions = info.positions_only if _is_plain(call.mask) else None
    if recorded and positions is not None:
        if is_first_to_ask("one document per row", positions):
            call.query = assert_single_document(call.query, positions)
        return attend_by_previous(call, None)
    speculation = None
    # Autograd would record a call that is discarded, and dropout would draw twice.
    if not (recorded or torch.is_grad_enabled() or call.dropout > 0.0):
        speculation = Speculation(call.layer, lambda: attend_by_previous(call, None))
    sequences = find_sequences(call.query, info, speculation)
    reject_recompute_without_info(call.layer, info, sequences is not None)
    if sequences is None and speculation is not None and speculation.output is not None:
        return speculation.output
    return attend_by_previous(call, sequences)


def attend_by_previous(call: AttentionCall, sequences: Sequences | None) -> Output:
    """Attend by the layer's previous function, within ``sequences`` if there are several."""
    mask = _dense_mask(call.mask, sequences, call.layer)
    if call.previous == "eager":
        mask = _additive_mask(call, mask)
    return call.layer.dense_attention[call.previous](
        call.module,
        call.query,
        call.key,
        call.value,
        mask,
        dropout=call.dropout,
        scaling=call.scale,
        **call.kwargs,
    )


def _is_plain(mask: LazyMask | Tensor | None) -> bool:
    """Whether a mask is known to be no more than causal, before any value is read."""
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
        # Chunks begin where documents do, so the mask must have been made for these documents.
        apart = (isolated == tensor) | ~sequences.is_real[:, None, :, None]
        isolated = require_rows(apart.flatten(1).all(-1), _CHUNKS, isolated)
    return isolated


def _additive_mask(call: AttentionCall, attention_mask: Tensor | None) -> Tensor | None:
    """Make the floating point mask of ``eager_mask`` from that of ``sdpa_mask``.

    While patched, a model that was eager gets ``sdpa_mask``, so that a long causal sequence needs
    no ``[S, S]`` mask. Short sequences get theirs here.
    """
    query, key = call.query, call.key
    if attention_mask is None:
        is_causal = getattr(call.module, "is_causal", True)
        if not is_causal or call.layer.skip_reason in OTHER_ATTENTION:
            return None
        q_len, kv_len = query.shape[2], key.shape[2]
        # A single query is the last token. Several queries without a mask start at the first key.
        first = kv_len - 1 if q_len == 1 else 0
        rows = torch.arange(first, first + q_len, device=query.device)
        attention_mask = rows[None, None, :, None] >= torch.arange(kv_len, device=query.device)
    if attention_mask.dtype is not torch.bool:
        return attention_mask
    zero = torch.zeros((), device=query.device, dtype=query.dtype)
    return torch.where(attention_mask, zero, torch.finfo(query.dtype).min)
