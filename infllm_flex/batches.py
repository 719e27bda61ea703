"""Read how a batch is padded or packed, with every check that needs no wait for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import infllm_flex_ops
from infllm_flex.config import InfLLMConfig
from infllm_flex.layout import Layout, lay_out, layout_unit

# Without the sizes: a graph with a size in a message would be one for that size alone.
_RUNS = "attention_mask must hold ones for real tokens in one run per row, and zeros"
_BOUNDS = "cu_seqlens must ascend from 0 to the length of key, one bound more than documents"


def lay_out_batch(
    query: Tensor,
    key: Tensor,
    config: InfLLMConfig,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Layout | None:
    """Lay out a padded or packed batch; None where it is neither.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        config: Sparsity settings.
        attention_mask: ``[B, Skv]``, bool or integer, 1 for real tokens, one run of them a row.
        cu_seqlens: int ``[N + 1]``, where documents start and the last one ends; B = 1, Sq = Skv.

    Raises:
        ValueError: Both are given, or one does not fit. What its values tell is told so on the CPU,
            and by an assertion on the device elsewhere and in a compiled graph.
    """
    if attention_mask is None and cu_seqlens is None:
        return None
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError("attention_mask and cu_seqlens are two ways to say it: give one of them")
    for name, x in (("attention_mask", attention_mask), ("cu_seqlens", cu_seqlens)):
        if x is not None and x.device != key.device:
            raise ValueError(f"{name} must be on the device of key, {key.device}, got {x.device}")
    if attention_mask is not None:
        _check_mask_shape(attention_mask, key)
        return lay_out_padded(attention_mask, config, query.shape[2])
    assert cu_seqlens is not None
    _check_bounds_shape(cu_seqlens, query, key)
    return lay_out_packed(cu_seqlens, config, key.shape[2])


def lay_out_padded(attention_mask: Tensor, config: InfLLMConfig, q_len: int) -> Layout:
    """Lay out rows of one run of real tokens each: ``attention_mask [B, Skv]``."""
    is_real = attention_mask != 0
    opens = is_real & ~F.pad(is_real[:, :-1], (1, 0))
    right = (opens.sum(-1) <= 1) & ((attention_mask == 0) | (attention_mask == 1)).all(-1)
    is_real = require(
        right,
        _RUNS,
        is_real,
    )
    unit = layout_unit(config)
    kv_len = (is_real.shape[1] + 2 * unit - 2) // unit * unit  # a start is moved up by unit - 1
    return lay_out(opens, is_real, unit, kv_len, q_len)


def lay_out_packed(cu_seqlens: Tensor, config: InfLLMConfig, length: int) -> Layout:
    """Lay out the documents between the bounds ``cu_seqlens [N + 1]`` of one row."""
    unit = layout_unit(config)
    bounds = cu_seqlens.long()
    right = (bounds.diff() >= 0).all() & (bounds[0] == 0) & (bounds[-1] == length)
    # An empty document starts where the next one does; one at the end, in the column that goes.
    opens = torch.zeros(length + 1, dtype=torch.bool, device=bounds.device)
    opens = opens.scatter(0, bounds[:-1].clamp(0, length), True)[None, :length]
    opens = require(
        right[None],
        _BOUNDS,
        opens,
    )
    kv_len = (length + (bounds.shape[0] - 1) * (unit - 1)) // unit * unit
    return lay_out(opens, torch.ones_like(opens), unit, kv_len, length)


def has_values(x: Tensor) -> bool:
    """Whether there is anything to read: neither on the meta device nor in a fake tensor."""
    return not x.is_meta and not isinstance(x, FakeTensor)


def is_recorded(x: Tensor) -> bool:
    """Whether what is done to ``x`` goes into a graph, so that no value may be waited for."""
    if torch.compiler.is_compiling():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def require(right: Tensor, message: str, dependent: Tensor) -> Tensor:
    """Raise unless all of ``right [B]`` holds, or assert it on the device where reading waits.

    Returns:
        ``dependent``, bool; in a graph or on a device its values depend on the check.
    """
    if right.device.type == "cpu" and not is_recorded(right) and has_values(right):
        if not right.all():
            raise ValueError(f"{message}: not so in row {int(right.long().argmin())}")
        return dependent
    return dependent | (infllm_flex_ops.zero_if(right.all(), message) != 0)


def _check_mask_shape(attention_mask: Tensor, key: Tensor) -> None:
    expected = (key.shape[0], key.shape[2])
    if attention_mask.shape != expected:
        raise ValueError(
            f"attention_mask must be [B, Skv] = {list(expected)}, got {list(attention_mask.shape)}"
        )
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise ValueError(f"attention_mask must be bool or integer, got {attention_mask.dtype}")


def _check_bounds_shape(cu_seqlens: Tensor, query: Tensor, key: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must be [N + 1] for N documents, got shape {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if key.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs documents in one row, got a batch of {key.shape[0]}")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"with cu_seqlens query must be as long as key, got {query.shape[2]} and {key.shape[2]}"
        )
