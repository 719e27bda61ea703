"""What one call of ``F.scaled_dot_product_attention`` asks for, and its sparse answer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from infllm_flex.attention import infllm_attention
from infllm_flex.patch.causal_masks import keys_so_far, require_causal
from infllm_flex.patch.errors import UnsupportedModelError
from infllm_flex.patch.head_dims import unserved_head_dims
from infllm_flex.patch.heads import regroup
from infllm_flex.patch.layer import PatchedLayer


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
        """Whether a query sees keys after itself. One query alone is the last of its sequence."""
        return not self.is_causal and self.attn_mask is None and self.query.shape[-2] > 1


def attend(layer: PatchedLayer, call: SdpaCall, kv_heads: int | None = None) -> Tensor | None:
    """Answer a call sparsely where it is long enough.

    Args:
        layer: The record of the layer that calls.
        call: Query ``[B, Hq, Sq, D]``, key and value ``[B, Hkv, Skv, D]``, or with the key heads
            expanded to the query heads; the rest as SDPA takes it.
        kv_heads: Key/value heads, where the caller knows better than the record.

    Returns:
        ``[B, Hq, Sq, D]``, or None where the call is dense and SDPA's to answer, untouched.

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
    if layer.attends_densely(call.key.shape[-2]):
        return None
    if call.query.dim() != 4:
        raise UnsupportedModelError(
            "sparse attention needs [B, H, S, D] queries, keys and values, got shape "
            f"{tuple(call.query.shape)}: call infllm_flex.infllm_attention in the model's own code"
        )
    heads_left = unserved_head_dims(call.key.shape[-1], call.value.shape[-1])
    if heads_left is not None:
        raise UnsupportedModelError(
            f"sparse attention cannot serve {heads_left}: run it inside infllm_flex.dense(model), "
            "or leave the layer out by attention_modules="
        )
    length = keys_so_far(call.query, call.key, call.attn_mask, call.is_causal)
    if layer.attends_densely(length):
        return None
    if call.dropout_p > 0:
        raise NotImplementedError(
            f"sparse attention cannot serve attention dropout ({call.dropout_p:g}) yet: got "
            f"{length} keys; set it to 0, or run inside infllm_flex.dense(model)"
        )
    query = require_causal(call.query, call.attn_mask)
    # What lies beyond is the unused room of a preallocated cache.
    key, value = call.key[:, :, :length], call.value[:, :, :length]
    heads = regroup(layer, query, key, value, kv_heads)
    out = infllm_attention(heads.query, heads.key, heads.value, layer.config, scale=call.scale)
    return heads.restore(out)
