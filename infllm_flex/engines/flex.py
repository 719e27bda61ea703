"""The engines of compiled FlexAttention: on the CPU, and on a GPU under one mask or several.

The query group is folded into the sequence. Where PyTorch would run FlexAttention uncompiled, the
fused engine takes its place, which is as exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import infllm_flex_ops
from infllm_flex.config import InfLLMConfig
from infllm_flex.engines.flex_compiled import (
    NotCompiledError,
    flex,
    flex_in_levels,
    fold_queries,
    run_compiled,
    unfold_queries,
)
from infllm_flex.engines.flex_level_masks import (
    Level,
    build_level_masks,
    can_split_backward,
)
from infllm_flex.engines.flex_masks import make_block_mask
from infllm_flex.engines.flex_options import (
    inference_options,
    single_mask_options,
    training_options,
)
from infllm_flex.engines.fused import FusedEngine
from infllm_flex_ops.device import device_capability
from infllm_flex_ops.sizes import ceil_div, group_size


class FlexLists(NamedTuple):
    """The masks that FlexAttention walks, and the selection that they were built of.

    Attributes:
        selected: int32 ``[B, Hkv, Sq, K]``.
        masks: One, or one per level.
    """

    selected: Tensor
    masks: list[BlockMask]


class FlexOnCpu(NamedTuple):
    """Inference on the CPU, at lengths padded to powers of two.

    FlexAttention's CPU code generator fails on many symbolic sizes. Lengths must therefore be
    static, and few; rows without blocks cost next to nothing.

    Attributes:
        config: Sparsity settings.
        fused: Takes over if PyTorch does not compile.
    """

    config: InfLLMConfig
    fused: FusedEngine

    def build_lists(self, selected: Tensor, key: Tensor) -> FlexLists:
        """Build one mask for the padded lengths."""
        Sq, Skv = selected.shape[2], key.shape[2]
        padded = F.pad(selected, (0, 0, 0, _power_of_two(Sq) - Sq), value=-1)
        mask = make_block_mask(
            padded,
            self.config,
            kv_len=_power_of_two(Skv),
            num_groups=self.fused.G,
            q_offset=Skv - Sq,
        )
        return FlexLists(selected, [mask])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, lists: FlexLists) -> Tensor:
        """Attend without gradients."""
        G, scale, mask = self.fused.G, self.fused.scale, lists.masks[0]
        rows, keys, values = (_pad_length(x) for x in (query, key, value))
        folded = fold_queries(rows, key.shape[1], G)
        try:
            out = run_compiled(flex, False, folded, keys, values, mask, scale, None)
        except NotCompiledError:
            return _attend_fused(self.fused, query, key, value, lists)
        return unfold_queries(out, G, G)[:, :, : query.shape[2]]


class FlexUnderOneMask(NamedTuple):
    """Inference on a GPU for groups that do not fill tensor cores: one mask with a bit test.

    Attributes:
        config: Sparsity settings.
        fused: Takes over if PyTorch does not compile.
    """

    config: InfLLMConfig
    fused: FusedEngine

    def build_lists(self, selected: Tensor, key: Tensor) -> FlexLists:
        """Build one mask."""
        kv_len, G = key.shape[2], self.fused.G
        mask = make_block_mask(selected, self.config, kv_len=kv_len, num_groups=G)
        return FlexLists(selected, [mask])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, lists: FlexLists) -> Tensor:
        """Attend without gradients."""
        G, scale, mask = self.fused.G, self.fused.scale, lists.masks[0]
        folded = fold_queries(query, key.shape[1], G)
        options = single_mask_options(mask)
        try:
            out = run_compiled(flex, None, folded, key, value, mask, scale, options)
        except NotCompiledError:
            return _attend_fused(self.fused, query, key, value, lists)
        out = unfold_queries(out, G, G).contiguous()
        return _repair_nonfinite(self.fused, out, query, key, value, lists)


class FlexInLevels(NamedTuple):
    """Inference and training on a GPU by levels of tiles, whose masks need no bit test.

    Attributes:
        config: Sparsity settings.
        fused: Takes over if PyTorch does not compile.
        levels: From `choose_levels`.
        training: Whether gradients are needed.
    """

    config: InfLLMConfig
    fused: FusedEngine
    levels: list[Level]
    training: bool

    def build_lists(self, selected: Tensor, key: Tensor) -> FlexLists:
        """Build a mask per level."""
        masks = build_level_masks(
            selected,
            self.config,
            self.levels,
            kv_len=key.shape[2],
            q_offset=key.shape[2] - selected.shape[2],
            backward=self.training,
        )
        return FlexLists(selected, masks)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, lists: FlexLists) -> Tensor:
        """Attend, with gradients if the engine was chosen for training."""
        kind = query.shape[3], query.dtype, device_capability(query.device)
        masks, scale = lists.masks, self.fused.scale
        if self.training:
            admitted = [training_options(mask, *kind) for mask in masks]
            masks, options = [mask for mask, _ in admitted], [option for _, option in admitted]
        else:
            options = [inference_options(mask, *kind) for mask in masks]
        rows = [level.rows for level in self.levels]
        try:
            out = run_compiled(flex_in_levels, None, query, key, value, masks, scale, options, rows)
        except NotCompiledError:
            return _attend_fused(self.fused, query, key, value, lists)
        return _repair_nonfinite(self.fused, out.contiguous(), query, key, value, lists)


def can_train(query: Tensor, key: Tensor, block_size: int) -> bool:
    """Whether FlexAttention's backward serves these shapes: on a GPU, by levels of tiles."""
    B, Hkv, Skv, _ = key.shape
    num_blocks = ceil_div(Skv, block_size)
    return (
        query.device.type == "cuda"
        and block_size % 16 == 0
        and can_split_backward(
            B, Hkv, query.shape[2], num_blocks, group_size(query.shape[1], key.shape[1])
        )
    )


def _attend_fused(
    fused: FusedEngine, query: Tensor, key: Tensor, value: Tensor, lists: FlexLists
) -> Tensor:
    return fused.attend(query, key, value, fused.build_lists(lists.selected, key))


def _repair_nonfinite(
    fused: FusedEngine, out: Tensor, query: Tensor, key: Tensor, value: Tensor, lists: FlexLists
) -> Tensor:
    """Attend again, in place, in the heads whose keys or values hold nan or inf.

    Autograd does not see it: what is replaced is not finite, so it has no gradient.
    """
    unseen = [x.detach() for x in (out, query, key, value)]
    infllm_flex_ops.repair_nonfinite_heads(*unseen, lists.selected, fused.block_size, fused.scale)
    return out


def _power_of_two(length: int) -> int:
    return 1 << (length - 1).bit_length()


def _pad_length(x: Tensor) -> Tensor:
    """Zero-fill ``[B, H, S, D]`` to the next power of two of S."""
    return F.pad(x, (0, 0, 0, _power_of_two(x.shape[2]) - x.shape[2]))
