"""The fused engine: the operator ``attend_blocks``, exact and differentiable on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import infllm_flex_ops
from infllm_flex_ops.block_attention.attend_blocks import ForwardLists, build_lists


class FusedLists(NamedTuple):
    """The selection, which the backward reads, and the lists of the forward.

    Attributes:
        selected: int32 ``[B, Hkv, Sq, K]``.
        forward: The blocks of each tile; None in a graph, where the operator builds them itself:
            the size of its tiles may depend on lengths that are symbols there.
    """

    selected: Tensor
    forward: ForwardLists | None


class FusedEngine(NamedTuple):
    """Attention through ``attend_blocks``, in memory linear in the length.

    Attributes:
        block_size: Keys per block.
        scale: Factor on the dot products.
        G: Query heads per key/value head.
        alignment: Sequences of a layout start at multiples of it; None for one sequence per row.
    """

    block_size: int
    scale: float
    G: int
    alignment: int | None = None

    def build_lists(self, selected: Tensor, key: Tensor) -> FusedLists:
        """Unite the blocks of each tile's tokens."""
        if torch.compiler.is_compiling():
            return FusedLists(selected, None)
        lists = build_lists(self.G, key, selected, self.block_size, None, self.alignment)
        return FusedLists(selected, lists)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, lists: FusedLists) -> Tensor:
        """Attend, with gradients to query, key and value."""
        tile_tokens, *united = lists.forward or (None, None, None, None)
        settings = self.block_size, self.scale, tile_tokens, self.alignment
        out, _ = infllm_flex_ops.attend_blocks(
            query, key, value, lists.selected, *settings, *united
        )
        return out
