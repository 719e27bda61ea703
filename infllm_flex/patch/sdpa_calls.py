"""One call of ``F.scaled_dot_product_attention``, and its sparse answer."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor

from infllm_flex.attention import attend_in_layout, infllm_attention
from infllm_flex.chunks import attend_chunk
from infllm_flex.patch.errors import UnsupportedModelError
from infllm_flex.patch.head_dims import unsupported_head_dims
from infllm_flex.patch.head_groups import regroup
from infllm_flex.patch.huggingface.documents import Sequences, find_sequences
from infllm_flex.patch.huggingface.sequence_info import (
    assert_single_document,
    read_sequence_info,
    reject_recompute_without_info,
)
from infllm_flex.patch.layer_state import PatchedLayer
from infllm_flex.patch.running_forward import current_forward
from infllm_flex.patch.sdpa_masks import assert_causal, assert_equal_mask, count_visible_keys
from infllm_flex.validation import is_recorded


class SdpaCall(NamedTuple):
    """The arguments of ``F.scaled_dot_product_attention``, by its own names and defaults."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def is_bidirectional(self) -> bool:
        """Whether a query sees keys after itself. A single query is the last of its sequence."""
        return not self.is_causal and self.attn_mask is None and self.query.shape[-2] > 1


def attend(layer: PatchedLayer, call: SdpaCall, kv_heads: int | None = None) -> Tensor | None:
    """Answer a call sparsely where it is long enough.

    A layer that calls SDPA itself knows nothing of documents. They are isolated nevertheless where
    the transformers model around it was given their bounds or positions.

    Args:
        layer: The record of the layer that calls.
        call: Query ``[B, Hq, Sq, D]``, key and value ``[B, Hkv, Skv, D]``, or with the key heads
            expanded to the query heads; the rest as SDPA takes it.
        kv_heads: Key/value heads, where the caller knows better than the record.

    Returns:
        ``[B, Hq, Sq, D]``, or None where the call is dense and SDPA should answer it unchanged.

    Raises:
        UnsupportedModelError: This is not plain causal attention.
        NotImplementedError: Attention dropout at sparse length.
    """
    if call.is_bidirectional:
        raise UnsupportedModelError(
            "F.scaled_dot_product_attention was called without is_causal=True or a mask, which is "
            "not causal: only causal language models can be sparse; name the causal layers of this "
            "model by attention_modules="
        )
    call, sequences = _read_documents(layer, call)
    if layer.attends_densely(call.key.shape[-2]):
        return None if sequences is None else _attend_densely(call, sequences)
    _reject_unsupported_shapes(call)
    length = call.key.shape[-2]
    if sequences is None:
        length = count_visible_keys(call.query, call.key, call.attn_mask, call.is_causal)
        if layer.attends_densely(length):
            return None
    if call.dropout_p > 0:
        raise NotImplementedError(
            f"sparse attention cannot serve attention dropout ({call.dropout_p:g}) yet: got "
            f"{length} keys; set it to 0, or run inside infllm_flex.dense(model)"
        )
    # A preallocated cache has unused slots after the visible keys.
    key, value = call.key[:, :, :length], call.value[:, :, :length]
    heads = regroup(layer, _check_mask(call, sequences), key, value, kv_heads)
    config, scale = layer.config, call.scale
    if sequences is not None:
        layout = sequences.layout(config)
        out = attend_in_layout(heads.query, heads.key, heads.value, config, layout, scale=scale)
    else:
        attend_plain = attend_chunk if call.query.shape[2] < length else infllm_attention
        out = attend_plain(heads.query, heads.key, heads.value, config, scale=scale)
    return heads.restore(out)


def _reject_unsupported_shapes(call: SdpaCall) -> None:
    if call.query.dim() != 4:
        raise UnsupportedModelError(
            "sparse attention needs [B, H, S, D] queries, keys and values, got shape "
            f"{tuple(call.query.shape)}: call infllm_flex.infllm_attention in the model's own code"
        )
    reason = unsupported_head_dims(call.key.shape[-1], call.value.shape[-1])
    if reason is not None:
        raise UnsupportedModelError(
            f"sparse attention cannot serve {reason}: run it inside infllm_flex.dense(model), "
            "or leave the layer out by attention_modules="
        )


def _check_mask(call: SdpaCall, sequences: Sequences | None) -> Tensor:
    """The query; in a graph its values depend on the check of the mask."""
    if sequences is None:
        return assert_causal(call.query, call.attn_mask)
    if call.attn_mask is None:
        return call.query
    # Either the mask isolates the documents, or it is plain causal and we isolate them.
    isolated, causal = sequences.isolate(call.attn_mask), sequences.isolate(None)
    return assert_equal_mask(call.query, cast(Tensor, isolated), cast(Tensor, causal))


def _read_documents(layer: PatchedLayer, call: SdpaCall) -> tuple[SdpaCall, Sequences | None]:
    """Find the sequences of a call, by what the model around the layer was given.

    Returns:
        The call, and its sequences; None for one per row. In a graph the query of a dense call
        without a mask carries an assertion that there is one document per row, because isolating
        several would take a mask.
    """
    if call.query.dim() != 4:
        return call, None
    if call.attn_mask is None and current_forward() is None and not layer.was_packed_by_model:
        return call, None  # a hand-written model, around which nothing is known
    info = read_sequence_info(call.query, call.key, call.attn_mask, {})
    positions = info.positions_only
    is_dense = layer.attends_densely(call.key.shape[-2])
    if is_dense and call.attn_mask is None and positions is not None and is_recorded(positions):
        return call._replace(query=assert_single_document(call.query, positions)), None
    sequences = find_sequences(call.query, info)
    forward = current_forward()
    if sequences is not None and forward is not None and not is_recorded(call.query):
        forward.mark(call.attn_mask)
    reject_recompute_without_info(layer, info, sequences is not None)
    return call, sequences


def _attend_densely(call: SdpaCall, sequences: Sequences) -> Tensor:
    mask = sequences.isolate(call.attn_mask)
    isolated = call._replace(attn_mask=mask, is_causal=False)
    return F.scaled_dot_product_attention(**isolated._asdict())
