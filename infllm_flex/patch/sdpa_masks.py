"""Serve or refuse the masks that layers pass to ``F.scaled_dot_product_attention``."""

from __future__ import annotations

import torch
from torch import Tensor

from infllm_flex.patch.causal_masks import is_causal_bias, is_causal_prefix, unbiased_visible_keys
from infllm_flex.patch.errors import UnsupportedModelError
from infllm_flex.validation import assert_in_graph, has_values, is_recorded

_NOT_CAUSAL = (
    "the model passes an attention mask beyond plain causal (padding, packed documents, a window, "
    "ALiBi or another bias): sparse attention serves plain causal sequences here; run it inside "
    "infllm_flex.dense(model), or call infllm_flex.infllm_attention in the model's own code"
)


def count_visible_keys(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> int:
    """Count the keys that the last query sees; they are the first ones.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``, longer than that where a cache is preallocated.
        mask: ``[..., Sq, Skv]``, bool (True: seen) or additive, or None.
        is_causal: As SDPA takes it: the first query sees the first key alone.

    Raises:
        UnsupportedModelError: The mask is not causal for ``Sq`` queries at the end of some keys.
    """
    q_len, kv_len = query.shape[-2], key.shape[-2]
    if mask is None:
        return q_len if is_causal else kv_len
    if is_causal_bias(mask):
        return q_len if mask.variant.name == "UPPER_LEFT" else kv_len  # type: ignore[attr-defined]
    if torch.compiler.is_compiling():
        if q_len != kv_len:
            raise UnsupportedModelError(
                f"{q_len} queries of {kv_len} keys under a mask, a preallocated cache, cannot be "
                "served by torch.compile at sparse length: decode without it, or compile inside "
                "infllm_flex.dense(model)"
            )
        return kv_len  # `assert_causal` puts the check into the graph
    visible = unbiased_visible_keys(mask)
    last = int(visible[..., -1, :].sum(-1).max())
    if last < q_len or not bool(is_causal_prefix(visible, last, q_len)):
        raise UnsupportedModelError(_NOT_CAUSAL)
    return last


def assert_causal(query: Tensor, mask: Tensor | None) -> Tensor:
    """Put the check of a mask into a graph that is being compiled, where it cannot be read.

    Returns:
        ``query``; in a graph its values depend on the check, so that no pass removes it.
    """
    if mask is None or is_causal_bias(mask) or not torch.compiler.is_compiling():
        return query
    visible = unbiased_visible_keys(mask)
    plain = is_causal_prefix(visible, visible.shape[-1], visible.shape[-2])
    return assert_in_graph(query, plain, _NOT_CAUSAL)


def assert_equal_mask(query: Tensor, mask: Tensor, expected: Tensor) -> Tensor:
    """Raise unless a mask shows exactly the expected keys; in a graph, put the check into it.

    Args:
        query: ``[B, Hq, S, D]``.
        mask: ``[..., S, S]`` as SDPA takes it.
        expected: bool ``[B, 1, S, S]``.

    Returns:
        ``query``; in a graph its values depend on the check.

    Raises:
        UnsupportedModelError: The mask shows anything else.
    """
    equal = (unbiased_visible_keys(mask) == expected).all()
    if is_recorded(query):
        return assert_in_graph(query, equal, _NOT_CAUSAL)
    if has_values(query) and not equal:
        raise UnsupportedModelError(_NOT_CAUSAL)
    return query
