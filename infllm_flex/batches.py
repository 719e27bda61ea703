"""Read how a batch is padded or packed, with every check that needs no wait for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex.config import InfLLMConfig
from infllm_flex.layout import Layout, lay_out, layout_alignment
from infllm_flex.validation import check_attention_mask, check_cu_seqlens, require_rows

# No sizes in these messages: Dynamo would specialise the graph on them.
_RUNS = "attention_mask must hold ones for real tokens in one run per row, and zeros"
_BOUNDS = "cu_seqlens must ascend from 0 to the length of key, one bound more than documents"


def lay_out_batch(
    key: Tensor,
    q_len: int,
    config: InfLLMConfig,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Layout | None:
    """Lay out a padded or packed batch; return None if it is neither.

    Args:
        key: ``[B, Hkv, Skv, D]``.
        q_len: Queries, ``Sq``.
        config: Sparsity settings.
        attention_mask: ``[B, Skv]``, bool or integer, 1 for real tokens, one run of them a row.
        cu_seqlens: int ``[N + 1]``, where documents start and the last one ends; B = 1, Sq = Skv.

    Raises:
        ValueError: Both are given, or one does not fit. Wrong values are found here on the CPU, and
            by an assertion on the device elsewhere and in a compiled graph.
    """
    if attention_mask is None and cu_seqlens is None:
        return None
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError("attention_mask and cu_seqlens are two ways to say it: give one of them")
    if attention_mask is not None:
        check_attention_mask(attention_mask, key)
        return lay_out_padded(attention_mask, config, q_len)
    assert cu_seqlens is not None
    check_cu_seqlens(cu_seqlens, key, q_len)
    return lay_out_packed(cu_seqlens, config, key.shape[2])


def lay_out_padded(attention_mask: Tensor, config: InfLLMConfig, q_len: int) -> Layout:
    """Lay out rows of one run of real tokens each: ``attention_mask [B, Skv]``."""
    is_real = attention_mask != 0
    opens = is_real & ~F.pad(is_real[:, :-1], (1, 0))
    is_valid = (opens.sum(-1) <= 1) & ((attention_mask == 0) | (attention_mask == 1)).all(-1)
    is_real = require_rows(is_valid, _RUNS, is_real)
    alignment = layout_alignment(config)
    # A start moves up by at most alignment - 1.
    kv_len = (is_real.shape[1] + 2 * alignment - 2) // alignment * alignment
    return lay_out(opens, is_real, alignment, kv_len, q_len)


def lay_out_packed(cu_seqlens: Tensor, config: InfLLMConfig, length: int) -> Layout:
    """Lay out the documents between the bounds ``cu_seqlens [N + 1]`` of one row."""
    alignment = layout_alignment(config)
    opens, is_valid = read_bounds(cu_seqlens, length)
    opens = require_rows(is_valid[None], _BOUNDS, opens)
    kv_len = (length + (cu_seqlens.shape[0] - 1) * (alignment - 1)) // alignment * alignment
    return lay_out(opens, torch.ones_like(opens), alignment, kv_len, length)


def read_bounds(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Read the bounds of the documents of one row.

    Args:
        cu_seqlens: int ``[N + 1]``.
        length: Tokens of the row, ``S``.

    Returns:
        bool ``[1, S]``, whether a document starts at the token, and bool ``[]``, whether the bounds
        ascend from 0 to ``S``.
    """
    bounds = cu_seqlens.long()
    is_valid = (bounds.diff() >= 0).all() & (bounds[0] == 0) & (bounds[-1] == length)
    # An empty document starts where the next one does; one at the end, in the column that goes.
    opens = torch.zeros(length + 1, dtype=torch.bool, device=bounds.device)
    opens = opens.scatter(0, bounds[:-1].clamp(0, length), True)[None, :length]
    return opens, is_valid
