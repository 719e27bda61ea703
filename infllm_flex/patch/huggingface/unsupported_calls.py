"""Calls that are long enough to be sparse but that sparse attention cannot serve, told in words.

Anything overlooked here would be a silently wrong answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import infllm_flex_ops
from infllm_flex.patch.causal_masks import is_plain_causal
from infllm_flex.patch.forward_context import recall
from infllm_flex.patch.huggingface.documents import Sequences
from infllm_flex.patch.huggingface.masks import LazyMask
from infllm_flex.validation import has_values, is_recorded

# Keywords by which models hand over attention that is more than softmax(scale * q k) v.
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


class AttentionCall(NamedTuple):
    """A call without earlier keys, and the sequences of its batch.

    Attributes:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        mask: As handed to the attention function.
        sequences: Of the batch; None for one per row.
        positions: ``[1 or B, Sq]``, where the call tells any.
    """

    query: Tensor
    key: Tensor
    mask: LazyMask | Tensor | None
    sequences: Sequences | None
    positions: Tensor | None


def find_unsupported(
    call: AttentionCall, dropout: float, kwargs: Mapping[str, Any], decoding: bool = False
) -> str | None:
    """What about a call cannot be served; None if all of it can.

    Args:
        call: The call. `assert_supported_in_graph` judges its mask where values cannot be read.
        dropout: Probability.
        kwargs: The other keywords of the call.
        decoding: Whether a cache holds keys from before this call; `attend_cached` judges the mask.
    """
    window = kwargs.get("sliding_window")
    if window is not None and window < call.key.shape[2]:
        return "a sliding window"
    for keyword, meaning in _SPECIAL_KEYWORDS.items():
        if kwargs.get(keyword) is not None:
            return meaning
    if kwargs.get("output_attentions"):
        return "attention weights (output_attentions=True)"
    if kwargs.get("is_causal") is False:
        return "attention that is not causal"
    if dropout > 0:
        return f"attention dropout ({dropout:g})"
    if decoding:
        return None if kwargs.get("cu_seq_lens_q") is None else "packed documents over a cache"
    n = call.query.shape[2]
    if n != call.key.shape[2]:
        return f"keys that no layer of a transformers cache holds ({n} queries)"
    if not _can_read(call.query) or call.mask is None:
        return None
    if isinstance(call.mask, LazyMask):
        served = call.mask.is_plain or call.mask.is_known(lambda: _isolates_documents(call))
        served = served and not call.mask.is_edited()
    else:
        mask = call.mask
        served = recall("plain causal", (mask,), lambda: bool(is_plain_causal(mask)))
    return None if served else _MASK


def assert_supported_in_graph(call: AttentionCall) -> Tensor:
    """Put the check of the mask into a graph, where its values cannot be read.

    Returns:
        The query, whose values depend on the check, so that no pass takes it out.
    """
    query, mask = call.query, call.mask
    if _can_read(query) or mask is None or (isinstance(mask, LazyMask) and mask.is_plain):
        return query
    served = _isolates_documents(call) if isinstance(mask, LazyMask) else is_plain_causal(mask)
    words = f"sparse attention cannot serve {_MASK} yet: {_INSTEAD}"
    return query + infllm_flex_ops.zero_if(served, words)


def _can_read(x: Tensor) -> bool:
    return not is_recorded(x) and has_values(x)


def _isolates_documents(call: AttentionCall) -> Tensor:
    """Whether a mask is causal within the sequences, or within what transformers takes for them.

    It lets a document begin wherever positions do anything else than go on by one; such a mask
    comes of positions alone, and what they mean is for us to say.
    """
    assert isinstance(call.mask, LazyMask)
    opens, is_real = _marks(call.query, call.sequences)
    served = call.mask.isolates_documents(opens, is_real)
    if call.positions is None or call.mask.padding is not None:
        return served
    jumps = torch.nn.functional.pad(call.positions.diff(dim=-1) != 1, (1, 0), value=True)
    return served | call.mask.isolates_documents(jumps.expand_as(opens), is_real)


def _marks(query: Tensor, sequences: Sequences | None) -> tuple[Tensor, Tensor]:
    """Where sequences open, and which tokens are real; ``[B, S]`` each."""
    if sequences is not None:
        return sequences.opens, sequences.is_real
    is_real = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
    return is_real.long().cumsum(-1) == 1, is_real
