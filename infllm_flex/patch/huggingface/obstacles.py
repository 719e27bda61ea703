"""Calls that are long enough to be sparse but that sparse attention cannot serve, told in words.

Anything overlooked here would be a silently wrong answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import custom_ops
from infllm_flex.patch.huggingface.masks import LazyMask
from infllm_flex.patch.huggingface.sequences import Sequences

# Keywords by which models hand over attention that is more than softmax(scale * q k) v.
_SPECIAL_KEYWORDS = {
    "softcap": "soft-capped logits",
    "s_aux": "learned attention sinks",
    "sinks": "learned attention sinks",
    "position_bias": "a position bias",
    "indices": "the model's own sparse selection",
    "block_indices": "the model's own sparse selection",
}
_MASK = "an attention mask beyond causal, padded and packed (a 4-D mask, prefixes, blocks)"


def find_obstacle(
    query: Tensor,
    key: Tensor,
    mask: LazyMask | Tensor | None,
    sequences: Sequences | None,
    dropout: float,
    kwargs: Mapping[str, Any],
    decoding: bool = False,
) -> str | None:
    """What about a call cannot be served; None if all of it can.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        mask: As handed to the attention function; not read while compiling, see
            `guard_compiled`.
        sequences: Of the batch.
        dropout: Probability.
        kwargs: The other keywords of the call.
        decoding: Whether a cache holds keys from before this call; `attend_cached` judges the mask.
    """
    window = kwargs.get("sliding_window")
    if window is not None and window < key.shape[2]:
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
    if query.shape[2] != key.shape[2]:
        return f"keys that no layer of a transformers cache holds ({query.shape[2]} queries)"
    if torch.compiler.is_compiling():
        return None
    if isinstance(mask, LazyMask):
        served = mask.is_plain or mask.is_known_to_separate(*_marks(query, sequences))
        return None if served else _MASK
    return None if mask is None else _MASK


def guard_compiled(
    query: Tensor, mask: LazyMask | Tensor | None, sequences: Sequences | None
) -> Tensor:
    """Put into a compiled graph the check that needs values, which cannot be read while compiling.

    Returns:
        ``query``, whose values depend on the check, so that no pass takes it out.
    """
    if mask is None or (isinstance(mask, LazyMask) and mask.is_plain):
        return query
    if isinstance(mask, LazyMask):
        served = mask.separates(*_marks(query, sequences))
    else:
        served = _plain_causal(mask)
    return query + custom_ops.zero_if(served, f"sparse attention cannot serve {_MASK} yet")


def _marks(query: Tensor, sequences: Sequences | None) -> tuple[Tensor, Tensor]:
    """Where sequences open, and which tokens are real; ``[B, S]`` each."""
    if sequences is not None:
        return sequences.opens, sequences.is_real
    is_real = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
    return is_real.long().cumsum(-1) == 1, is_real


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
