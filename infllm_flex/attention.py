"""The dense/sparse switch: attend densely to short sequences, to selected blocks of long ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex.config import InfLLMConfig
from infllm_flex.engines import attend_with_flex, attend_with_lists
from infllm_flex.selection import (
    check_query_and_key,
    default_scale,
    reject_batch_layouts,
    select_blocks,
)


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
        config: Sparsity settings. Dense iff ``Skv < config.dense_len``.
        scale: Factor on the dot products. Defaults to ``1 / sqrt(D)``.
        attention_mask: Not served yet.
        cu_seqlens: Not served yet.
        selected: A choice of blocks made beforehand by ``select_blocks``, say with other queries
            and keys; int32 ``[B, Hkv, Sq, K]``. Chosen here by default.

    Returns:
        ``[B, Hq, Sq, D]`` in the dtype of ``query``. Gradients reach query, key and value through
        the attended blocks; none flows through the choice of blocks.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
        NotImplementedError: A padded or packed batch, or ``use_nope`` without ``selected``.

    Source: arXiv 2509.24663, section 3.
    """
    check_query_and_key(query, key)
    _check_value(key, value)
    reject_batch_layouts(attention_mask, cu_seqlens)
    scale = default_scale(query) if scale is None else scale
    if config.is_dense(key.shape[2]):
        return _attend_dense(query, key, value, scale)
    if selected is None:
        if config.use_nope:
            raise NotImplementedError(
                "use_nope scores with the queries and keys from before the rotary embedding: "
                "pass selected=select_blocks(query_nope, key_nope, config)"
            )
        selected = select_blocks(query, key, config, scale=scale)
    attend = attend_with_flex if _use_flex(query, key, value, config) else attend_with_lists
    return attend(query, key, value, selected, config, scale)


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


def _use_flex(query: Tensor, key: Tensor, value: Tensor, config: InfLLMConfig) -> bool:
    """FlexAttention for inference: where asked for on a GPU, on the CPU wherever it can go.

    Training goes through ``attend_blocks`` on every device, as does float64. FlexAttention's CPU
    code fails on a query that the same graph has just folded; it loses a nan among scores, and lets
    one among values reach rows that do not see it.
    """
    if config.engine == "fused" or query.dtype == torch.float64:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return False
    if query.device.type == "cuda":
        return config.engine == "flex"
    if torch.compiler.is_compiling():
        return False
    # Sums are finite only where all terms are, and cost one pass without a temporary.
    return all(bool(x.sum(dtype=torch.float32).isfinite()) for x in (query, key, value))
