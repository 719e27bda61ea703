"""Attention over selected blocks: compiled FlexAttention, or the ``attend_blocks`` operator."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    FlexKernelOptions,
    flex_attention,
)

import custom_ops
from infllm_flex.block_mask import build_block_mask
from infllm_flex.config import InfLLMConfig
from infllm_flex.split_masks import build_split_masks, can_split

_MAX_GRAPHS = 32  # static lengths are powers of two, so a program needs few


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
    out, _ = custom_ops.attend_blocks(
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
    would run FlexAttention uncompiled.
    """
    Hq, Sq = query.shape[1:3]
    Hkv, Skv = key.shape[1:3]
    rows, keys, values, choice = query, key, value, selected
    if query.device.type == "cpu":
        rows, keys, values = _pad_length(rows), _pad_length(keys), _pad_length(values)
        choice = F.pad(selected, (0, 0, 0, rows.shape[2] - Sq), value=-1)
    masks = _build_masks(choice, config, keys.shape[2], Hq // Hkv, Skv - Sq)
    folded = rows.unflatten(1, (Hkv, -1)).transpose(2, 3).flatten(2, 3)  # [B, Hkv, Sq * G, D]
    options = [_kernel_options(mask) if query.device.type == "cuda" else None for mask in masks]
    if torch.compiler.is_compiling():
        out = _flex(folded, keys, values, masks, scale, options)
    else:
        with torch._dynamo.config.patch(recompile_limit=_MAX_GRAPHS):
            compiled = _compiled_flex(False if query.device.type == "cpu" else None)
            out = compiled(folded, keys, values, masks, scale, options)
    if out is None:
        return attend_with_lists(query, key, value, selected, config, scale)
    out = out.unflatten(2, (-1, Hq // Hkv))[:, :, :Sq].transpose(2, 3).flatten(1, 2)
    if query.device.type == "cuda":
        out = out.contiguous()
        custom_ops.redo_special_heads(out, query, key, value, selected, config.block_size, scale)
    return out


def _build_masks(
    selected: Tensor, config: InfLLMConfig, kv_len: int, num_groups: int, first: int
) -> list[BlockMask]:
    """One mask; or on a GPU, where the group fills tensor cores, two that need no bit test."""
    if selected.device.type == "cuda" and can_split(num_groups):
        return list(
            build_split_masks(selected, config, kv_len=kv_len, num_groups=num_groups, first=first)
        )
    mask = build_block_mask(selected, config, kv_len=kv_len, num_groups=num_groups, first=first)
    return [mask]


def _pad_length(x: Tensor) -> Tensor:
    """Zero-fill ``[B, H, S, D]`` to the next power of two of S.

    FlexAttention's CPU code generator fails on many symbolic sizes, so lengths must be static, and
    few. Rows without blocks cost next to nothing.
    """
    S = x.shape[2]
    return F.pad(x, (0, 0, 0, (1 << (S - 1).bit_length()) - S))


def _kernel_options(block_mask: BlockMask) -> FlexKernelOptions:
    """Fit FlexAttention's matrix products into the mask's tiles and blocks."""
    rows, keys = block_mask.BLOCK_SIZE
    return {"BLOCK_M": min(rows & -rows, 128), "BLOCK_N": min(keys & -keys, 64)}


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: list[BlockMask],
    scale: float,
    options: list[FlexKernelOptions | None],
) -> Tensor | None:
    """FlexAttention where a compiler takes it up, ``None`` where it would run uncompiled.

    Uncompiled FlexAttention scores every pair of tokens. PyTorch runs this very function so when
    its recompile limit is hit or compilation is switched off, which the test below tells apart.
    """
    if not torch.compiler.is_dynamo_compiling():
        _warn_uncompiled()
        return None
    if len(masks) == 1:
        return flex_attention(q, k, v, block_mask=masks[0], scale=scale, kernel_options=options[0])
    parts = [
        flex_attention(
            q,
            k,
            v,
            block_mask=mask,
            scale=scale,
            kernel_options=option,
            return_aux=AuxRequest(lse=True),
        )
        for mask, option in zip(masks, options, strict=True)
    ]
    return merge_attention([out for out, _ in parts], [cast(Tensor, aux.lse) for _, aux in parts])


def merge_attention(outs: list[Tensor], lses: list[Tensor]) -> Tensor:
    """Join attention over disjoint sets of keys by their log-sum-exp; -inf where a set is empty.

    Args:
        outs: Each ``[..., S, D]``.
        lses: Natural log-sum-exp of each, ``[..., S]``.
    """
    lse = torch.stack(lses).logsumexp(0)
    total = torch.zeros_like(outs[0], dtype=torch.float32)
    for out, part in zip(outs, lses, strict=True):
        weight = torch.where(part == -torch.inf, 0.0, torch.exp(part - lse))
        total = total + weight[..., None] * out
    return total.to(outs[0].dtype)


@functools.cache
def _compiled_flex(dynamic: bool | None) -> Callable[..., Tensor | None]:
    """Compile once per process and kind of shapes."""
    return torch.compile(_flex, dynamic=dynamic)


@functools.cache
def _warn_uncompiled() -> None:
    warnings.warn(
        "torch.compile did not take up FlexAttention (recompile limit, or compilation disabled): "
        "infllm_attention goes on with its own operator, as exact and slower; "
        "see torch._dynamo.config.recompile_limit",
        RuntimeWarning,
        stacklevel=2,
    )
