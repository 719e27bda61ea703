"""The settings that decide which blocks a query selects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

# Windows are scored in groups of this many. In a matrix product of whole groups of columns, and of
# a multiple of a few rows, the bits of a row depend neither on the number of rows nor on the
# threads. This holds for the library that PyTorch ships for x86, with AVX2 and AVX-512; products of
# other widths take other code paths as soon as threads share them.
COLUMNS = 64


class Windows(NamedTuple):
    """Pooling windows: their size in tokens, and the step between them."""

    size: int
    stride: int

    def num_visible(self, position: int) -> int:
        """Count the windows that lie wholly at or before ``position``."""
        return max(0, (position + 1 - self.size) // self.stride + 1)

    def num_scored(self, position: int) -> int:
        """Round the number of visible windows up to whole groups of ``COLUMNS``."""
        return -(-self.num_visible(position) // COLUMNS) * COLUMNS


class SelectionRule(NamedTuple):
    """The settings of a selection, in the order in which the operators take them.

    The schemas of the operators stay flat, since a schema holds numbers and tensors only. Their
    definitions, fakes and launchers pack the numbers into this tuple and pass it on whole.

    Attributes:
        kernel_size: Pooling window of the compressed keys, in tokens.
        kernel_stride: Step between their windows, in tokens.
        coarse_size: Pooling window of the coarse keys, in tokens.
        coarse_stride: Step between their windows, in tokens.
        block_size: Keys per block, a multiple of ``kernel_stride``.
        init_blocks: First blocks, always selected.
        local_blocks: Blocks before the query's own that are always selected, as its own is.
        num_selected: Budget in blocks; forced blocks count toward it.
    """

    kernel_size: int
    kernel_stride: int
    coarse_size: int
    coarse_stride: int
    block_size: int
    init_blocks: int
    local_blocks: int
    num_selected: int

    @classmethod
    def split(cls, args: Sequence[Any]) -> tuple[SelectionRule, tuple[Any, ...]]:
        """Split the arguments of an operator into the rule that they start with and the rest."""
        count = len(cls._fields)
        return cls(*args[:count]), tuple(args[count:])

    @classmethod
    def from_pooled(
        cls, window: int, block_size: int, init_blocks: int, local_blocks: int, num_selected: int
    ) -> SelectionRule:
        """Make the rule of a pooled query: its windows do not overlap and need no normaliser."""
        return cls(
            window, window, window, window, block_size, init_blocks, local_blocks, num_selected
        )

    @property
    def pooled(self) -> tuple[int, int, int, int, int]:
        """The arguments of ``from_pooled``, as the pooled operators take them."""
        return (self.kernel_size, *self[4:])

    @property
    def windows(self) -> Windows:
        """Windows of the compressed keys."""
        return Windows(self.kernel_size, self.kernel_stride)

    @property
    def coarse_windows(self) -> Windows:
        """Windows of the coarse keys."""
        return Windows(self.coarse_size, self.coarse_stride)

    @property
    def budget_tokens(self) -> int:
        """Tokens of the whole budget: a query at a position below this sees no more blocks."""
        return self.num_selected * self.block_size

    def num_slots(self, kv_len: int) -> int:
        """Slots of a query's list: the budget, or all blocks if they are fewer.

        Branch-free, so that a symbolic length stays symbolic under ``torch.compile``.
        """
        return torch.sym_min(self.num_selected, (kv_len + self.block_size - 1) // self.block_size)
