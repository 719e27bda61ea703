"""The dense/sparse switch: attend to all of a short sequence, to selected blocks of a long one."""

from __future__ import annotations

import torch
from torch import Tensor

from infllm_flex.batches import lay_out_batch
from infllm_flex.config import InfLLMConfig
from infllm_flex.dense_attention import attend_dense, attend_dense_in_layout
from infllm_flex.engines.choose import choose_engine
from infllm_flex.layout import Layout
from infllm_flex.selection import select_blocks_unchecked
from infllm_flex.validation import prepare_attention
from infllm_flex_ops.sizes import ceil_div


def infllm_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: InfLLMConfig,
    *,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """Attend causally: densely if the sequence is short, else to the selected blocks of each query.

    Args:
        query: ``[B, Hq, Sq, D]``, after the rotary embedding; the last ``Sq`` positions.
        key: ``[B, Hkv, Skv, D]``; ``Hkv`` divides ``Hq``, any ratio. ``D`` is at most 256.
        value: ``[B, Hkv, Skv, D]``.
        config: Sparsity settings. A sequence is dense iff its length is below ``dense_len``, each
            sequence of a padded or packed batch by its own length; with ``dense_by="position"``
            each query by the length up to itself.
        scale: Factor on the dot products, positive. Defaults to ``1 / sqrt(D)``.
        attention_mask: ``[B, Skv]``, bool or integer, 1 for real tokens, which are one run per row.
            Nothing is read from padding, and its output is zero.
        cu_seqlens: int32 ``[N + 1]``: documents packed along S start at all but the last, which is
            S; they may be empty. B is 1 and Sq = Skv. No document sees another.
        selected: Blocks from an earlier call of ``select_blocks``, perhaps with other queries and
            keys, with the same mask or bounds; int32 ``[B, Hkv, Sq, K]``, ascending, each once,
            unused slots last as -1. None selects them here.

    Returns:
        ``[B, Hq, Sq, D]`` in the dtype of ``query``. Gradients reach query, key and value through
        the attended blocks; none flows through the selection of blocks.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the scale is not positive. A
            mask with gaps, bounds that do not ascend to S, or blocks that do not ascend raise it
            where finding out needs no wait for a device.
        NotImplementedError: ``use_nope`` without ``selected``.

    Source: arXiv 2509.24663, section 3.
    """
    query, key, value, scale, selected = prepare_attention(query, key, value, scale, selected)
    layout = lay_out_batch(key, query.shape[2], config, attention_mask, cu_seqlens)
    by_position = config.dense_by == "position"
    if layout is None:
        return _attend_alone(query, key, value, config, scale, selected, by_position)
    return _attend_in_layout(query, key, value, config, layout, scale, selected, by_position)


def attend_in_layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: InfLLMConfig,
    layout: Layout | None,
    *,
    scale: float | None = None,
    selected: Tensor | None = None,
    by_position: bool = False,
) -> Tensor:
    """Attend within each sequence of a batch that is laid out already.

    Arguments and result are those of ``infllm_attention``, which makes the ``layout`` itself; it is
    None for one sequence per row. ``by_position`` holds whatever ``config.dense_by`` is.
    """
    query, key, value, scale, selected = prepare_attention(query, key, value, scale, selected)
    by_position = by_position or config.dense_by == "position"
    if layout is None:
        return _attend_alone(query, key, value, config, scale, selected, by_position)
    return _attend_in_layout(query, key, value, config, layout, scale, selected, by_position)


def _attend_alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: InfLLMConfig,
    scale: float,
    selected: Tensor | None,
    by_position: bool,
) -> Tensor:
    """Attend in one sequence per row."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if config.is_dense(kv_len):
        return attend_dense(query, key, value, scale)
    longest = config.longest_dense
    num_dense = longest - (kv_len - q_len) if by_position else 0
    # Within the budget every block is selected anyhow, unless the caller selected others.
    if num_dense <= 0 or (selected is None and longest <= config.budget_tokens):
        return _attend_sparse(query, key, value, config, scale, selected)
    early = query[:, :, :num_dense], key[:, :, :longest], value[:, :, :longest]
    if selected is not None:
        selected = selected[:, :, num_dense:]
    late = _attend_sparse(query[:, :, num_dense:], key, value, config, scale, selected)
    return torch.cat([attend_dense(*early, scale), late], 2)


def _attend_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: InfLLMConfig,
    scale: float,
    selected: Tensor | None,
) -> Tensor:
    if selected is None:
        _refuse_nope(config)
        selected = select_blocks_unchecked(query, key, config, scale)
    engine = choose_engine(query, key, value, config, scale)
    return engine.attend(query, key, value, engine.build_lists(selected, key))


def _attend_in_layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: InfLLMConfig,
    layout: Layout,
    scale: float,
    selected: Tensor | None,
    by_position: bool,
) -> Tensor:
    q_len, kv_len = query.shape[2], key.shape[2]
    if config.is_dense(kv_len):
        return attend_dense_in_layout(query, key, value, layout, scale)
    q, k, v = layout.move_queries(query), layout.move_keys(key), layout.move_keys(value)
    # Dense sequences select all their blocks, so that they are attended with the sparse ones.
    dense_slots = ceil_div(config.longest_dense, config.block_size)
    if selected is None:
        _refuse_nope(config)
        documents = layout.documents(config, dense_slots=0 if by_position else dense_slots)
        num_slots = max(config.num_selected, dense_slots)
        laid_out = select_blocks_unchecked(q, k, config, scale, documents, num_slots)
        if by_position and num_slots > config.num_selected:
            laid_out = layout.list_dense(laid_out, config, dense_slots, by_position=True)
    else:
        laid_out = layout.move_selected(selected, config, dense_slots, by_position=by_position)
    engine = choose_engine(q, k, v, config, scale, layout.alignment)
    out = engine.attend(q, k, v, engine.build_lists(laid_out, k))
    return layout.move_back(out, q_len)


def _refuse_nope(config: InfLLMConfig) -> None:
    if config.use_nope:
        raise NotImplementedError(
            "use_nope scores with the queries and keys from before the rotary embedding: "
            "pass selected=select_blocks(query_nope, key_nope, config)"
        )
