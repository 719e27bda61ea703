"""Attention over selected blocks: compiled FlexAttention, or the ``attend_blocks`` operator."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

import custom_ops
from infllm_flex.block_mask import build_block_mask
from infllm_flex.config import InfLLMConfig

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
    block_mask = build_block_mask(
        choice,
        config,
        kv_len=keys.shape[2],
        num_groups=Hq // Hkv,
        first=Skv - Sq,
    )
    folded = rows.unflatten(1, (Hkv, -1)).transpose(2, 3).flatten(2, 3)  # [B, Hkv, Sq * G, D]
    options = _kernel_options(block_mask) if query.device.type == "cuda" else None
    if torch.compiler.is_compiling():
        out = _flex(folded, keys, values, block_mask, scale, options)
    else:
        with torch._dynamo.config.patch(recompile_limit=_MAX_GRAPHS):
            compiled = _compiled_flex(False if query.device.type == "cpu" else None)
            out = compiled(folded, keys, values, block_mask, scale, options)
    if out is None:
        return attend_with_lists(query, key, value, selected, config, scale)
    out = out.unflatten(2, (-1, Hq // Hkv))[:, :, :Sq].transpose(2, 3).flatten(1, 2)
    if query.device.type == "cuda":
        out = out.contiguous()
        custom_ops.redo_special_heads(out, query, key, value, selected, config.block_size, scale)
    return out


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
    block_mask: BlockMask,
    scale: float,
    kernel_options: FlexKernelOptions | None,
) -> Tensor | None:
    """FlexAttention where a compiler takes it up, ``None`` where it would run uncompiled.

    Uncompiled FlexAttention scores every pair of tokens. PyTorch runs this very function so when
    its recompile limit is hit or compilation is switched off, which the test below tells apart.
    """
    if not torch.compiler.is_dynamo_compiling():
        _warn_uncompiled()
        return None
    return flex_attention(
        q, k, v, block_mask=block_mask, scale=scale, kernel_options=kernel_options
    )


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
