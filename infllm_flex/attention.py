"""The dense/sparse switch: attend densely to short sequences, to selected blocks of long ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex.autocast import as_autocast
from infllm_flex.batches import lay_out_batch
from infllm_flex.config import InfLLMConfig
from infllm_flex.engines.choose import (
    attend_with_flex,
    attend_with_lists,
    can_train_with_flex,
    needs_gradients,
    warn_backward_refused,
)
from infllm_flex.layout import Layout
from infllm_flex.selection import check_query_and_key, choose_blocks, default_scale
from infllm_flex_ops.transforms import is_transformed


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
        config: Sparsity settings. A sequence is dense iff its length is below ``dense_len``; in a
            padded or packed batch each for itself.
        scale: Factor on the dot products. Defaults to ``1 / sqrt(D)``.
        attention_mask: ``[B, Skv]``, bool or integer, 1 for real tokens, which are one run per row.
            Nothing is read from padding, and its output is zero.
        cu_seqlens: int32 ``[N + 1]``: documents packed along S start at all but the last, which is
            S; they may be empty. B is 1 and Sq = Skv. No document sees another.
        selected: A choice of blocks made beforehand by ``select_blocks``, say with other queries
            and keys, and the same mask or bounds; int32 ``[B, Hkv, Sq, K]``. Chosen here by
            default.

    Returns:
        ``[B, Hq, Sq, D]`` in the dtype of ``query``. Gradients reach query, key and value through
        the attended blocks; none flows through the choice of blocks.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together; a mask with gaps or bounds that
            do not ascend to S, where that can be told without waiting for a device.
        NotImplementedError: ``use_nope`` without ``selected``.

    Source: arXiv 2509.24663, section 3.
    """
    query, key, value = (as_autocast(x) for x in (query, key, value))
    check_query_and_key(query, key)
    _check_value(key, value)
    layout = lay_out_batch(query, key, config, attention_mask, cu_seqlens)
    if layout is not None:
        return attend_in_layout(query, key, value, config, layout, scale=scale, selected=selected)
    scale = default_scale(query) if scale is None else scale
    if config.is_dense(key.shape[2]):
        return _attend_dense(query, key, value, scale)
    if selected is None:
        _refuse_nope(config)
        selected = choose_blocks(query, key, config, scale)
    return _attend_sparse(query, key, value, selected, config, scale)


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
    """Attend within each sequence of a padded or packed batch, densely or sparsely by its length.

    Arguments and result are those of ``infllm_attention``, which makes the ``layout`` itself. With
    ``query_by_query`` the tokens of the sequence up to each query count, in place of all of them.
    """
    query, key, value = (as_autocast(x) for x in (query, key, value))
    check_query_and_key(query, key)
    _check_value(key, value)
    scale = default_scale(query) if scale is None else scale
    q_len, kv_len = query.shape[2], key.shape[2]
    if config.is_dense(kv_len):
        return _attend_dense_in_layout(query, key, value, layout, scale)
    q, k, v = layout.move_queries(query), layout.move_keys(key), layout.move_keys(value)
    # Dense sequences take every block of theirs, and so travel with the sparse ones.
    dense_slots = -(-max(config.dense_len - 1, 0) // config.block_size)
    if selected is None:
        _refuse_nope(config)
        own_slots = 0 if query_by_query else dense_slots
        documents = layout.documents(config, dense_slots=own_slots)
        num_slots = max(config.num_selected, dense_slots)
        chosen = choose_blocks(q, k, config, scale, documents, num_slots)
        if query_by_query:
            chosen = layout.list_dense(chosen, config, dense_slots, query_by_query=True)
    else:
        chosen = layout.move_selected(selected, config, dense_slots)
    out = _attend_sparse(q, k, v, chosen, config, scale, unit=layout.unit)
    return layout.move_back(out, q_len)


def _check_value(key: Tensor, value: Tensor) -> None:
    if value.shape != key.shape:
        raise ValueError(
            f"value must have the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}"
        )
    if value.dtype != key.dtype:
        raise ValueError(f"key and value must have one dtype, got {key.dtype} and {value.dtype}")
    if value.device != key.device:
        raise ValueError(
            f"key and value must be on one device, got {key.device} and {value.device}"
        )


def _attend_dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal SDPA, aligned at the last position."""
    Sq, Skv = query.shape[2], key.shape[2]
    enable_gqa = query.shape[1] != key.shape[1]
    if Sq == Skv:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
    # Here, since it imports the compiler, which `import infllm_flex` must not wait for.
    from torch.nn.attention.bias import causal_lower_right

    mask = None if Sq == 1 else causal_lower_right(Sq, Skv)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
    )


def _attend_dense_in_layout(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
) -> Tensor:
    """SDPA under the mask of the sequences; padding is zero on both sides of it.

    SDPA multiplies what a mask hides by zero, so here, unlike where a sequence is sparse, a nan in
    a document makes nan of those packed with it.
    """
    Sq, G = query.shape[2], query.shape[1] // key.shape[1]
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


def _attend_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor,
    config: InfLLMConfig,
    scale: float,
    unit: int | None = None,
) -> Tensor:
    if _use_flex(query, key, value, config):
        return attend_with_flex(query, key, value, selected, config, scale)
    return attend_with_lists(query, key, value, selected, config, scale, unit)


def _use_flex(query: Tensor, key: Tensor, value: Tensor, config: InfLLMConfig) -> bool:
    """FlexAttention where asked for on a GPU; for inference on the CPU wherever it can go.

    Training goes through ``attend_blocks`` on the CPU, where FlexAttention has no backward, and so
    does float64 everywhere. FlexAttention's CPU code fails on a query that the same graph has just
    folded; it loses a nan among scores, and lets one among values reach rows that do not see it.
    Under ``torch.func`` and forward-mode AD, `attend_blocks` serves what it can and refuses others.
    """
    if config.engine == "fused" or query.dtype == torch.float64:
        return False
    if query.device.type == "cuda":
        if config.engine != "flex":
            return False
        if not torch.compiler.is_compiling() and is_transformed(query, key, value):
            return False
        serves = not needs_gradients(query, key, value) or can_train_with_flex(query, key, config)
        if not serves and not torch.compiler.is_compiling():  # a graph takes up no warnings
            warn_backward_refused()
        return serves
    if needs_gradients(query, key, value) or torch.compiler.is_compiling():
        return False
    if is_transformed(query, key, value):
        return False
    # Sums are finite only where all terms are, and cost one pass without a temporary.
    return all(bool(x.sum(dtype=torch.float32).isfinite()) for x in (query, key, value))
