"""Compiled FlexAttention on folded queries, in one part or in several merged by log-sum-exp."""

from __future__ import annotations

import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

_MAX_GRAPHS = 32  # static lengths are powers of two, so a program needs few
_SLOW_SECONDS = 3.0  # after which the user is told what the first call of a shape waits for
_log = logging.getLogger(__name__)
_met: set[tuple[object, ...]] = set()  # shapes of queries that were compiled for


def fold_queries(query: Tensor, num_kv_heads: int, rows: int) -> Tensor:
    """Fold a group into the sequence: ``[B, Hq, S, D]`` to ``[B, Hkv, S * rows, D]``.

    A token's rows are its G heads, and zeros where ``rows`` is more.
    """
    grouped = query.unflatten(1, (num_kv_heads, -1)).transpose(2, 3)  # [B, Hkv, S, G, D]
    if rows > grouped.shape[3]:
        grouped = F.pad(grouped, (0, 0, 0, rows - grouped.shape[3]))
    return grouped.flatten(2, 3)


def unfold_queries(out: Tensor, num_groups: int, rows: int) -> Tensor:
    """Undo ``fold_queries`` on what has one entry per row, ``[B, Hkv, S * rows, ...]``."""
    grouped = out.unflatten(2, (-1, rows))[:, :, :, :num_groups]
    return grouped.transpose(2, 3).flatten(1, 2)


def run_compiled(
    function: Callable[..., Tensor | None], dynamic: bool | None, *args: Any
) -> Tensor | None:
    """Call within the graph being compiled, or else compiled by itself."""
    if torch.compiler.is_compiling():
        return function(*args)
    with (
        torch._dynamo.config.patch(recompile_limit=_MAX_GRAPHS),
        _say_if_slow((function, args[0].shape, args[0].dtype, args[0].device)),
    ):
        return _compiled(function, dynamic)(*args)


@contextmanager
def _say_if_slow(shape: tuple[object, ...]) -> Iterator[None]:
    """Tell the user, once, that the first call of a shape compiles, if that takes seconds."""
    if shape in _met:
        yield
        return
    timer = threading.Timer(_SLOW_SECONDS, _say_compiling)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        _met.add(shape)


@functools.cache
def _say_compiling() -> None:
    _log.warning(
        "compiling FlexAttention for a new length: some seconds, once for each power of two"
    )


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    options: FlexKernelOptions | None,
) -> Tensor | None:
    """FlexAttention where a compiler takes it up, ``None`` where it would run uncompiled.

    Uncompiled FlexAttention scores every pair of tokens. PyTorch runs this very function so when
    its recompile limit is hit or compilation is switched off, which the test below tells apart.
    """
    if not torch.compiler.is_dynamo_compiling():
        _warn_uncompiled()
        return None
    return flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=options)


def flex_in_levels(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    masks: list[BlockMask],
    scale: float,
    options: list[FlexKernelOptions],
    rows: list[int],
) -> Tensor | None:
    """The same for ``query [B, Hq, S, D]`` under masks of levels of so many rows per token."""
    if not torch.compiler.is_dynamo_compiling():
        _warn_uncompiled()
        return None
    num_groups = query.shape[1] // k.shape[1]
    folds: dict[int, Tensor] = {}
    outs, lses = [], []
    for mask, option, n in zip(masks, options, rows, strict=True):
        if n not in folds:  # levels of as many rows share the copy
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
        outs.append(unfold_queries(out, num_groups, n))
        lses.append(unfold_queries(cast(Tensor, aux.lse), num_groups, n))
    return merge_attention(outs, lses).contiguous()  # here, it costs no copy


def merge_attention(outs: list[Tensor], lses: list[Tensor]) -> Tensor:
    """Join attention over disjoint sets of keys by their log-sum-exp; -inf where a set is empty.

    Args:
        outs: Each ``[..., S, D]``.
        lses: Natural log-sum-exp of each, ``[..., S]``.
    """
    top = functools.reduce(torch.maximum, lses).detach()
    top = top.masked_fill(top == -torch.inf, 0.0)  # no key in any set: weights 0, gradients too
    weights = [(lse - top).exp() for lse in lses]
    total = functools.reduce(torch.add, weights)
    total = total.masked_fill(total == 0.0, 1.0)
    merged = torch.zeros_like(outs[0], dtype=total.dtype)
    for out, weight in zip(outs, weights, strict=True):
        merged = merged + (weight / total)[..., None] * out
    return merged.to(outs[0].dtype)


@functools.cache
def _compiled(
    function: Callable[..., Tensor | None], dynamic: bool | None
) -> Callable[..., Tensor | None]:
    """Compile once per process."""
    return torch.compile(function, dynamic=dynamic)


@functools.cache
def _warn_uncompiled() -> None:
    warnings.warn(
        "torch.compile did not take up FlexAttention (recompile limit, or compilation disabled): "
        "infllm_attention goes on with its own operator, as exact and slower; "
        "see torch._dynamo.config.recompile_limit",
        RuntimeWarning,
        stacklevel=2,
    )
