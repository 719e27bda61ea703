"""Attention of many queries over earlier keys, each dense or sparse as if it had come alone."""

from __future__ import annotations

from torch import Tensor

from infllm_flex.attention import attend_in_layout
from infllm_flex.batches import lay_out_batch
from infllm_flex.config import InfLLMConfig


def attend_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: InfLLMConfig,
    *,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Attend densely or sparsely from each query, by the tokens of its row up to it.

    A generation then turns sparse at the same token whether tokens come one by one, in chunks or as
    drafts that are checked together, and whether the row is padded or alone.

    Args:
        query: ``[B, Hq, Sq, D]``, the last tokens of the rows.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, D]``.
        config: Sparsity settings. A query is dense iff its row holds fewer than ``dense_len``
            tokens up to it, its own included; padding does not count.
        scale: Factor on the dot products. Defaults to ``1 / sqrt(D)``.
        attention_mask: ``[B, Skv]``, bool or integer, 1 for real tokens, which are one run per row.

    Returns:
        ``[B, Hq, Sq, D]``, as ``infllm_attention`` returns it.
    """
    layout = lay_out_batch(key, query.shape[2], config, attention_mask, None)
    return attend_in_layout(query, key, value, config, layout, scale=scale, by_position=True)
