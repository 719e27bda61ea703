"""Attention over selected blocks: compiled FlexAttention, or the ``attend_blocks`` operator."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

import infllm_flex_ops
from infllm_flex.config import InfLLMConfig
from infllm_flex.engines.flex_compiled import (
    flex,
    flex_in_levels,
    fold_queries,
    run_compiled,
    unfold_queries,
)
from infllm_flex.engines.flex_level_masks import (
    build_split_masks,
    can_split,
    can_split_backward,
    choose_levels,
)
from infllm_flex.engines.flex_masks import build_block_mask
from infllm_flex.engines.flex_options import (
    inference_options,
    single_mask_options,
    training_options,
)
from infllm_flex_ops.device import device_capability


def attend_with_lists(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor,
    config: InfLLMConfig,
    scale: float,
    unit: int | None = None,
) -> Tensor:
    """Attend through ``attend_blocks``: exact and differentiable on any device, linear memory.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, D]``.
        selected: int32 ``[B, Hkv, Sq, K]``.
        config: Sparsity settings.
        scale: Factor on the dot products.
        unit: In a layout, the tokens of which a sequence takes whole numbers.

    Returns:
        ``[B, Hq, Sq, D]``.
    """
    out, _ = infllm_flex_ops.attend_blocks(
        query, key, value, selected, config.block_size, scale, unit=unit
    )
    return out


def attend_with_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor,
    config: InfLLMConfig,
    scale: float,
) -> Tensor:
    """Attend through compiled FlexAttention, the query group folded into the sequence.

    Arguments and result are those of ``attend_with_lists``, as is the attention where PyTorch
    would run FlexAttention uncompiled. Gradients need what ``can_train_with_flex`` asks for.
    """
    if query.device.type == "cuda":
        out = _attend_on_gpu(query, key, value, selected, config, scale)
    else:
        out = _attend_on_cpu(query, key, value, selected, config, scale)
    if out is None:
        return attend_with_lists(query, key, value, selected, config, scale)
    return out


def can_train_with_flex(query: Tensor, key: Tensor, config: InfLLMConfig) -> bool:
    """Whether FlexAttention's backward serves these shapes: on a GPU, with masks in levels."""
    (B, Hq), (Hkv, Skv) = query.shape[:2], key.shape[1:3]
    num_blocks = -(-Skv // config.block_size)
    return (
        query.device.type == "cuda"
        and config.block_size % 16 == 0
        and can_split_backward(B, Hkv, query.shape[2], num_blocks, Hq // Hkv)
    )


@functools.cache
def warn_backward_refused() -> None:
    """Say once that training goes another way than asked."""
    warnings.warn(
        "engine='flex' cannot train these shapes (served: 4 to 127 query heads per KV head, blocks "
        "of a multiple of 16 keys, lists of tiles by block up to 1 GiB): gradients go through "
        "attend_blocks, as exact",
        RuntimeWarning,
        stacklevel=2,
    )


def _attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, selected: Tensor, config: InfLLMConfig, scale: float
) -> Tensor | None:
    (Hkv, Skv), (Hq, Sq) = key.shape[1:3], query.shape[1:3]
    rows, keys, values = _pad_length(query), _pad_length(key), _pad_length(value)
    choice = F.pad(selected, (0, 0, 0, rows.shape[2] - Sq), value=-1)
    mask = build_block_mask(
        choice, config, kv_len=keys.shape[2], num_groups=Hq // Hkv, first=Skv - Sq
    )
    folded = fold_queries(rows, Hkv, Hq // Hkv)
    out = run_compiled(flex, False, folded, keys, values, mask, scale, None)
    return None if out is None else unfold_queries(out, Hq // Hkv, Hq // Hkv)[:, :, :Sq]


def _attend_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, selected: Tensor, config: InfLLMConfig, scale: float
) -> Tensor | None:
    """Where the group fills tensor cores, by levels that need no bit test; else by one mask."""
    Hkv, G = key.shape[1], query.shape[1] // key.shape[1]
    first = key.shape[2] - query.shape[2]
    training = needs_gradients(query, key, value)
    out: Tensor | None
    if training or can_split(G):
        levels = choose_levels(G, backward=training)
        masks = build_split_masks(
            selected, config, levels, kv_len=key.shape[2], first=first, backward=training
        )
        head_dim, dtype = query.shape[3], query.dtype
        capability = device_capability(query.device)
        if training:
            chosen = [training_options(mask, head_dim, dtype, capability) for mask in masks]
            masks, options = [mask for mask, _ in chosen], [option for _, option in chosen]
        else:
            options = [inference_options(mask, head_dim, dtype, capability) for mask in masks]
        rows = [level.rows for level in levels]
        out = run_compiled(flex_in_levels, None, query, key, value, masks, scale, options, rows)
    else:
        mask = build_block_mask(selected, config, kv_len=key.shape[2], num_groups=G, first=first)
        flat = fold_queries(query, Hkv, G)
        out = run_compiled(flex, None, flat, key, value, mask, scale, single_mask_options(mask))
        out = None if out is None else unfold_queries(out, G, G)
    if out is None:
        return None
    out = out.contiguous()
    # In place and out of autograd's sight: what it replaces is not finite, and so has no gradient.
    unseen = [x.detach() for x in (out, query, key, value)]
    infllm_flex_ops.redo_special_heads(*unseen, selected, config.block_size, scale)
    return out


def needs_gradients(*inputs: Tensor) -> bool:
    """Whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _pad_length(x: Tensor) -> Tensor:
    """Zero-fill ``[B, H, S, D]`` to the next power of two of S.

    FlexAttention's CPU code generator fails on many symbolic sizes, so lengths must be static, and
    few. Rows without blocks cost next to nothing.
    """
    S = x.shape[2]
    return F.pad(x, (0, 0, 0, (1 << (S - 1).bit_length()) - S))
