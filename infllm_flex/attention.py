"""The dense/sparse switch: attend to all of a short sequence, to selected blocks of a long one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex.batches import lay_out_batch
from infllm_flex.config import InfLLMConfig
from infllm_flex.engines.choose import choose_engine
from infllm_flex.layout import Layout
from infllm_flex.selection import select_blocks_unchecked
from infllm_flex.validation import prepare_attention
from infllm_flex_ops.sizes import ceil_div, group_size


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
            sequence of a padded or packed batch by its own length.
        scale: Factor on the dot products. Defaults to ``1 / sqrt(D)``.
        attention_mask: ``[B, Skv]``, bool or integer, 1 for real tokens, which are one run per row.
            Nothing is read from padding, and its output is zero.
        cu_seqlens: int32 ``[N + 1]``: documents packed along S start at all but the last, which is
            S; they may be empty. B is 1 and Sq = Skv. No document sees another.
        selected: Blocks from an earlier call of ``select_blocks``, perhaps with other queries and
            keys, with the same mask or bounds; int32 ``[B, Hkv, Sq, K]``. None selects them here.

    Returns:
        ``[B, Hq, Sq, D]`` in the dtype of ``query``. Gradients reach query, key and value through
        the attended blocks; none flows through the selection of blocks.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together. A mask with gaps, or bounds that
            do not ascend to S, raise it where finding out needs no wait for a device.
        NotImplementedError: ``use_nope`` without ``selected``.

    Source: arXiv 2509.24663, section 3.
    """
    query, key, value, scale = prepare_attention(query, key, value, scale)
    layout = lay_out_batch(key, query.shape[2], config, attention_mask, cu_seqlens)
    if layout is not None:
        return _attend_in_layout(query, key, value, config, layout, scale, selected, False)
    if config.is_dense(key.shape[2]):
        return _attend_dense(query, key, value, scale)
    if selected is None:
        _refuse_nope(config)
        selected = select_blocks_unchecked(query, key, config, scale)
    engine = choose_engine(query, key, value, config, scale)
    return engine.attend(query, key, value, engine.build_lists(selected, key))


def attend_in_layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: InfLLMConfig,
    layout: Layout,
    *,
    scale: float | None = None,
    selected: Tensor | None = None,
    query_by_query: bool = False,
) -> Tensor:
    """Attend within each sequence of a batch that is laid out already.

    Arguments and result are those of ``infllm_attention``, which makes the ``layout`` itself. With
    ``query_by_query`` the tokens of the sequence up to each query decide if it is dense; else all
    tokens of the sequence do.
    """
    query, key, value, scale = prepare_attention(query, key, value, scale)
    return _attend_in_layout(query, key, value, config, layout, scale, selected, query_by_query)


def _attend_in_layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: InfLLMConfig,
    layout: Layout,
    scale: float,
    selected: Tensor | None,
    query_by_query: bool,
) -> Tensor:
    q_len, kv_len = query.shape[2], key.shape[2]
    if config.is_dense(kv_len):
        return _attend_dense_in_layout(query, key, value, layout, scale)
    q, k, v = layout.move_queries(query), layout.move_keys(key), layout.move_keys(value)
    # Dense sequences select all their blocks, so that they are attended with the sparse ones.
    dense_slots = ceil_div(max(config.dense_len - 1, 0), config.block_size)
    if selected is None:
        _refuse_nope(config)
        documents = layout.documents(config, dense_slots=0 if query_by_query else dense_slots)
        num_slots = max(config.num_selected, dense_slots)
        laid_out = select_blocks_unchecked(q, k, config, scale, documents, num_slots)
        if query_by_query:
            laid_out = layout.list_dense(laid_out, config, dense_slots, query_by_query=True)
    else:
        laid_out = layout.move_selected(selected, config, dense_slots)
    engine = choose_engine(q, k, v, config, scale, layout.alignment)
    out = engine.attend(q, k, v, engine.build_lists(laid_out, k))
    return layout.move_back(out, q_len)


def _attend_dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal SDPA, aligned at the last position."""
    Sq, Skv = query.shape[2], key.shape[2]
    enable_gqa = query.shape[1] != key.shape[1]
    if Sq == Skv:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
    # Imported here: it imports the compiler, for which `import infllm_flex` must not wait.
    from torch.nn.attention.bias import causal_lower_right

    mask = None if Sq == 1 else causal_lower_right(Sq, Skv)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
    )


def _attend_dense_in_layout(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
) -> Tensor:
    """SDPA under the mask of the sequences; padding is zero before and after it.

    SDPA multiplies hidden values by zero. A nan in a document therefore reaches those packed with
    it here, but not where a sequence is sparse.
    """
    Sq, G = query.shape[2], group_size(query, key)
    is_real = layout.is_real()[:, None, :, None]
    key, value = (torch.where(is_real, x, 0) for x in (key, value))
    query = torch.where(is_real[:, :, -Sq:], query, 0)
    # SDPA's fast kernels take no mask together with enable_gqa.
    key, value = (x.repeat_interleave(G, 1) if G > 1 else x for x in (key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=layout.dense_mask(Sq), scale=scale
    )
    return torch.where(is_real[:, :, -Sq:], out, 0)


def _refuse_nope(config: InfLLMConfig) -> None:
    if config.use_nope:
        raise NotImplementedError(
            "use_nope scores with the queries and keys from before the rotary embedding: "
            "pass selected=select_blocks(query_nope, key_nope, config)"
        )
