"""The choice between the fused operator and FlexAttention, taken here and nowhere else."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from infllm_flex.config import InfLLMConfig
from infllm_flex.engines.flex import FlexInLevels, FlexOnCpu, FlexUnderOneMask, can_train
from infllm_flex.engines.flex_level_masks import can_split, choose_levels
from infllm_flex.engines.fused import FusedEngine
from infllm_flex_ops import torch_private
from infllm_flex_ops.sizes import group_size


class Engine(Protocol):
    """Attention of one call over selected blocks, in two steps."""

    def build_lists(self, selected: Tensor, key: Tensor) -> Any:
        """Build the lists of blocks that the engine's kernels walk.

        Args:
            selected: int32 ``[B, Hkv, Sq, K]``, ascending, -1 for unused slots.
            key: ``[B, Hkv, Skv, D]``, for its shape, dtype and device.
        """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, lists: Any) -> Tensor:
        """Attend over the lists: ``[B, Hq, Sq, D]``.

        Args:
            query: ``[B, Hq, Sq, D]``.
            key: ``[B, Hkv, Skv, D]``.
            value: ``[B, Hkv, Skv, D]``.
            lists: From ``build_lists``, for the selection of this query.
        """


def choose_engine(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: InfLLMConfig,
    scale: float,
    alignment: int | None = None,
) -> Engine:
    """Choose the engine of a call.

    FlexAttention runs on a GPU if ``engine`` is ``"flex"``, and on the CPU for inference unless it
    is ``"fused"``. The fused operator runs everywhere else: FlexAttention has no backward on the
    CPU, no float64, and no place under ``torch.func`` or forward-mode AD. Its CPU code also fails
    on a query that the same graph has folded, loses a nan among scores, lets a nan among values
    reach rows that do not see it, and without AVX-512 is wrong for blocks of 8, 24, 40... keys.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        value: ``[B, Hkv, Skv, D]``.
        config: Sparsity settings.
        scale: Factor on the dot products.
        alignment: Sequences of a layout start at multiples of it; None for one sequence per row.
    """
    G = group_size(query.shape[1], key.shape[1])
    fused = FusedEngine(config.block_size, scale, G, alignment)
    compiling = torch.compiler.is_compiling()
    if config.engine == "fused" or query.dtype == torch.float64:
        return fused
    if query.device.type == "cuda":
        if config.engine != "flex" or (not compiling and _is_transformed(query, key, value)):
            return fused
        training = _needs_gradients(query, key, value)
        if training and not can_train(query, key, config.block_size):
            if not compiling:  # a graph cannot hold a warning
                _warn_cannot_train()
            return fused
        if training or can_split(G):
            return FlexInLevels(config, fused, choose_levels(G, backward=training), training)
        return FlexUnderOneMask(config, fused)
    if config.block_size % 16 == 8:  # wrong without AVX-512
        return fused
    if _needs_gradients(query, key, value) or compiling or _is_transformed(query, key, value):
        return fused
    return FlexOnCpu(config, fused) if _all_finite(query, key, value) else fused


def _needs_gradients(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _is_transformed(*inputs: Tensor) -> bool:
    """Whether ``torch.func`` or forward-mode AD is running, which compiled code would ignore."""
    if torch_private.are_transforms_active():
        return True
    return any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def _all_finite(*inputs: Tensor) -> bool:
    # A sum is finite only if all its terms are, and needs one pass and no temporary tensor.
    return all(bool(x.sum(dtype=torch.float32).isfinite()) for x in inputs)


def _warn_cannot_train() -> None:
    """Warn that training runs on another engine; Python's filter shows it once."""
    warnings.warn(
        "engine='flex' cannot train these shapes (served: 4 to 127 query heads per KV head, blocks "
        "of a multiple of 16 keys, lists of tiles by block up to 1 GiB): gradients go through "
        "attend_blocks, as exact",
        RuntimeWarning,
        stacklevel=2,
    )
