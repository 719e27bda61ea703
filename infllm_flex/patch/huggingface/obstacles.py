"""Calls that are long enough to be sparse but that sparse attention cannot serve, told in words.

Anything overlooked here would be a silently wrong answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import custom_ops

# Keywords by which models hand over attention that is more than softmax(scale * q k) v.
_SPECIAL_KEYWORDS = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capped logits",
    "s_aux": "learned attention sinks",
    "sinks": "learned attention sinks",
    "position_bias": "a position bias",
    "indices": "the model's own sparse selection",
    "block_indices": "the model's own sparse selection",
    "cu_seq_lens_q": "packed documents (cu_seq_lens_q)",
    "cu_seq_lens_k": "packed documents (cu_seq_lens_k)",
}
_MASK = "an attention mask beyond plain causal (padding, packed documents, or a 4-D mask)"
_POSITIONS = "position_ids that restart or jump (packed documents)"


def find_obstacle(
    query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, kwargs: Mapping[str, Any]
) -> str | None:
    """What about a call cannot be served; None if all of it can.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        mask: As handed to the attention function; not read while compiling, see
            `compiled_conditions`.
        dropout: Probability.
        kwargs: The other keywords of the call.
    """
    for keyword, meaning in _SPECIAL_KEYWORDS.items():
        if kwargs.get(keyword) is not None:
            return meaning
    if kwargs.get("output_attentions"):
        return "attention weights (output_attentions=True)"
    if kwargs.get("is_causal") is False:
        return "attention that is not causal"
    if dropout > 0:
        return f"attention dropout ({dropout:g})"
    if query.shape[2] != key.shape[2]:
        return f"decoding, chunked prefill or a static cache ({query.shape[2]} queries)"
    if mask is not None and not torch.compiler.is_compiling():
        return _MASK
    return None


def find_position_obstacle(position_ids: Tensor | None, q_len: int) -> str | None:
    """Packed documents whose boundaries only the positions tell; None if there are none.

    transformers looks at positions only where there is neither cache nor mask. On an accelerator
    this waits for the device, so it is for one layer to do on behalf of all.
    """
    positions = _token_positions(position_ids, q_len)
    if positions is None or torch.compiler.is_compiling() or _consecutive(positions):
        return None
    return _POSITIONS


def guard_compiled(query: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """Put into a compiled graph the checks that need values, which cannot be read while compiling.

    Without a cache, or with an ``attention_mask``, transformers then makes a mask for every
    sequence, plain causal or not.

    Returns:
        ``query``, whose values depend on the checks, so that no pass takes these out.
    """
    if mask is not None:
        query = query + custom_ops.zero_if(
            _plain_causal(mask), f"sparse attention cannot serve {_MASK} yet"
        )
    if (positions := _token_positions(position_ids, query.shape[2])) is not None:
        message = f"sparse attention cannot serve {_POSITIONS} yet"
        query = query + custom_ops.zero_if(_consecutive(positions), message)
    return query


def _token_positions(position_ids: Tensor | None, q_len: int) -> Tensor | None:
    """Positions if they are one per token; rotary embeddings over images have more axes."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[-1] != q_len:
        return None
    return position_ids


def _consecutive(position_ids: Tensor) -> Tensor:
    return (position_ids.diff(dim=-1) == 1).all()


def _plain_causal(mask: Tensor) -> Tensor:
    """Whether a mask is plain causal, from four lines through it, so that it is never stored.

    What each query sees just before and just after itself, what all see of the first key, and what
    the last sees of all: that tells padding, packing, prefixes, windows and chunks.
    """
    visible = mask if mask.dtype is torch.bool else mask == 0
    after_first = torch.arange(1, mask.shape[-1], device=mask.device)
    return (
        visible[..., after_first, after_first - 1].all()
        & ~visible[..., after_first - 1, after_first].any()
        & visible[..., :, 0].all()
        & visible[..., -1, :].all()
    )
