"""Compiled FlexAttention on folded queries: one call, or several merged by log-sum-exp."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    FlexKernelOptions,
    flex_attention,
)

from infllm_flex.engines.compile_notice import CompileNotice
from infllm_flex_ops import torch_private
from infllm_flex_ops.sizes import group_size

MAX_GRAPHS = 32  # static lengths are powers of two, so a program needs few
_notice = CompileNotice(patience=3.0)


class NotCompiledError(RuntimeError):
    """PyTorch ran a function uncompiled that makes sense only compiled."""


def fold_queries(query: Tensor, num_kv_heads: int, rows: int) -> Tensor:
    """Fold a query group into the sequence: ``[B, Hq, S, D]`` to ``[B, Hkv, S * rows, D]``.

    The rows of a token are its G heads, then zeros up to ``rows``.
    """
    grouped = query.unflatten(1, (num_kv_heads, -1)).transpose(2, 3)  # [B, Hkv, S, G, D]
    if rows > grouped.shape[3]:
        grouped = F.pad(grouped, (0, 0, 0, rows - grouped.shape[3]))
    return grouped.flatten(2, 3)


def unfold_queries(out: Tensor, G: int, rows: int) -> Tensor:
    """Undo ``fold_queries`` on a tensor with one entry per row, ``[B, Hkv, S * rows, ...]``."""
    grouped = out.unflatten(2, (-1, rows))[:, :, :, :G]
    return grouped.transpose(2, 3).flatten(1, 2)


def run_compiled(function: Callable[..., Tensor], dynamic: bool | None, *args: Any) -> Tensor:
    """Call a function within the graph being compiled, else compiled by itself.

    Args:
        function: `flex` or `flex_in_levels`.
        dynamic: As ``torch.compile`` takes it.
        args: Arguments of the function; a tensor first.

    Raises:
        NotCompiledError: The recompile limit is hit, or compilation is switched off.
    """
    if torch.compiler.is_compiling():
        return function(*args)
    with (
        torch_private.recompile_limit(MAX_GRAPHS),
        _notice.watch((function, args[0].shape, args[0].dtype, args[0].device)),
    ):
        return _compiled(function, dynamic)(*args)


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    options: FlexKernelOptions | None,
) -> Tensor:
    """Call FlexAttention on folded queries ``[B, Hkv, S * rows, D]``, compiled only.

    Uncompiled FlexAttention would score every pair of tokens.

    Raises:
        NotCompiledError: No compiler traces this call.
    """
    _require_compiler()
    return flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=options)


def flex_in_levels(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    masks: list[BlockMask],
    scale: float,
    options: list[FlexKernelOptions],
    rows: list[int],
) -> Tensor:
    """Do the same for ``query [B, Hq, S, D]`` under the masks of several levels.

    Args:
        query: ``[B, Hq, S, D]``; folded here.
        k: ``[B, Hkv, Skv, D]``.
        v: ``[B, Hkv, Skv, D]``.
        masks: One per level.
        scale: Factor on the dot products.
        options: One per level.
        rows: Rows per token, one per level.

    Raises:
        NotCompiledError: No compiler traces this call.
    """
    _require_compiler()
    G = group_size(query.shape[1], k.shape[1])
    folds: dict[int, Tensor] = {}
    outs, lses = [], []
    for mask, option, n in zip(masks, options, rows, strict=True):
        if n not in folds:  # levels of as many rows use the same copy
            folds[n] = fold_queries(query, k.shape[1], n)
        q = folds[n]
        out, aux = flex_attention(
            q,
            k,
            v,
            block_mask=mask,
            scale=scale,
            kernel_options=option,
            return_aux=AuxRequest(lse=True),
        )
        outs.append(unfold_queries(out, G, n))
        lses.append(unfold_queries(cast(Tensor, aux.lse), G, n))
    return merge_attention(outs, lses).contiguous()  # inside the graph it costs no copy


def _require_compiler() -> None:
    if not torch.compiler.is_dynamo_compiling():
        _warn_uncompiled()
        raise NotCompiledError


def merge_attention(outs: list[Tensor], lses: list[Tensor]) -> Tensor:
    """Merge attention over disjoint sets of keys by their log-sum-exp, -inf where a set is empty.

    Args:
        outs: Each ``[..., S, D]``.
        lses: Natural log-sum-exp of each, ``[..., S]``.
    """
    largest = functools.reduce(torch.maximum, lses).detach()
    # Without a key in any set the weights are 0, and so are their gradients.
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    weights = [(lse - largest).exp() for lse in lses]
    total = functools.reduce(torch.add, weights)
    total = total.masked_fill(total == 0.0, 1.0)
    merged = torch.zeros_like(outs[0], dtype=total.dtype)
    for out, weight in zip(outs, weights, strict=True):
        merged = merged + (weight / total)[..., None] * out
    return merged.to(outs[0].dtype)


@functools.cache
def _compiled(function: Callable[..., Tensor], dynamic: bool | None) -> Callable[..., Tensor]:
    """Compile once per process."""
    return torch.compile(function, dynamic=dynamic)


def _warn_uncompiled() -> None:
    """Warn; Python's filter shows it once."""
    warnings.warn(
        "torch.compile did not take up FlexAttention (recompile limit, or compilation disabled): "
        "infllm_attention goes on with its own operator, as exact and slower; "
        "see torch._dynamo.config.recompile_limit",
        RuntimeWarning,
        stacklevel=2,
    )
