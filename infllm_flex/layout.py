"""Padded and packed batches as sequences that start on a block boundary, and back.

Every sequence (a padded row, or a document of a packed one) moves so that its first token lands on
a multiple of ``unit`` tokens. Its blocks, pooling windows and the operators' tiles then lie as they
would if it were alone. Everything is computed on the device: sizes depend on shapes alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex.config import InfLLMConfig


@dataclass(frozen=True)
class Layout:
    """Where every token of a batch goes, and which sequence it belongs to.

    Attributes:
        unit: Sequences start at multiples of it, in tokens.
        offset: Position of the first query in the layout; the queries are its last positions.
        place: int64 ``[B, Skv]``, the position of each token in the layout, -1 for padding.
        token: int64 ``[B, Skv']``, the token at each position of the layout, -1 where there is
            none. ``Skv'`` is a multiple of ``unit``.
        first: int64 ``[B, Skv]``, the position of the first token of each token's sequence.
        length: int64 ``[B, Skv]``, the tokens in each token's sequence.
    """

    unit: int
    offset: int
    place: Tensor
    token: Tensor
    first: Tensor
    length: Tensor

    def move_keys(self, x: Tensor) -> Tensor:
        """Lay out ``[B, H, Skv, D]`` as ``[B, H, Skv', D]``, zero where there is no token."""
        return _Move.apply(x, self.token, self.place, 0)

    def move_queries(self, x: Tensor, fill: int = 0) -> Tensor:
        """Lay out ``[B, H, Sq, D]``, the last tokens, as the last positions ``[B, H, Sq', D]``."""
        token, place = self._query_indices(x.shape[2])
        return _Move.apply(x, token, place, fill)

    def move_back(self, x: Tensor, q_len: int, fill: int = 0) -> Tensor:
        """Take ``[B, H, Sq', D]`` back to ``[B, H, Sq, D]``, ``fill`` at padding."""
        token, place = self._query_indices(q_len)
        return _Move.apply(x, place, token, fill)

    def _query_indices(self, q_len: int) -> tuple[Tensor, Tensor]:
        first_query = self.place.shape[1] - q_len
        return (
            (self.token[:, self.offset :] - first_query).clamp(min=-1),
            (self.place[:, first_query:] - self.offset).clamp(min=-1),
        )

    def documents(self, config: InfLLMConfig, *, dense_slots: int = 0) -> Tensor:
        """Write the table that ``infllm_flex_ops.selection.select_blocks`` reads.

        Args:
            config: Sparsity settings.
            dense_slots: Blocks that suffice for any dense sequence; 0 to let none be dense.

        Returns:
            int32 ``[B, Skv' / unit, 3]``: the first position of the sequence in that part of the
            layout, the position after its last token, and its queries' budget in blocks.
        """
        token = self.token[:, :: self.unit]  # sequences start there, so a part without one is empty
        here = token.clamp(min=0)
        first, length = self.first.gather(1, here), self.length.gather(1, here)
        budget = torch.full_like(length, config.num_selected)
        if dense_slots:
            budget = torch.where(length < config.dense_len, dense_slots, budget)
        table = torch.stack([first, first + length, budget], -1)
        return torch.where((token >= 0)[..., None], table, 0).int()

    def move_selected(self, selected: Tensor, config: InfLLMConfig, dense_slots: int) -> Tensor:
        """Lay out a choice ``[B, Hkv, Sq, K]`` numbered by sequence, in blocks of the layout.

        Sequences shorter than ``dense_len`` take every block of theirs, whatever was chosen.
        """
        own_first = self.first_block(config.block_size, selected.shape[2])[:, None, :, None]
        selected = torch.where(selected < 0, -1, selected + own_first)
        selected = self.move_queries(selected, fill=-1)
        return self.list_dense(selected, config, dense_slots)

    def list_dense(
        self,
        selected: Tensor,
        config: InfLLMConfig,
        dense_slots: int,
        *,
        query_by_query: bool = False,
    ) -> Tensor:
        """Give every block of its past to a query that is dense, whatever was chosen.

        Args:
            selected: ``[B, Hkv, Sq', K]`` in blocks of the layout.
            config: Sparsity settings.
            dense_slots: Blocks that suffice for any dense query; 0 where none is.
            query_by_query: Whether the tokens of the sequence up to a query make it dense, or all.
        """
        if not dense_slots:
            return selected
        missing = max(0, dense_slots - selected.shape[3])
        selected = F.pad(selected, (0, missing), value=-1)
        parts = self.documents(config).repeat_interleave(self.unit, 1)[:, self.offset :]
        first, end, _ = parts[:, None, :, None].unbind(-1)  # each [B, 1, Sq', 1]
        slot = torch.arange(selected.shape[3], device=selected.device, dtype=torch.int32)
        position = torch.arange(self.offset, self.token.shape[1], device=selected.device)[:, None]
        block = first // config.block_size + slot
        seen = (block * config.block_size <= position) & (position < end)
        everything = torch.where(seen, block, -1)
        length = position + 1 - first if query_by_query else end - first
        return torch.where(length < config.dense_len, everything, selected)

    def first_block(self, block_size: int, q_len: int) -> Tensor:
        """Number, for every query, the block its sequence starts at: int32 ``[B, Sq]``."""
        return (self.first[:, self.first.shape[1] - q_len :] // block_size).int()

    def is_real(self) -> Tensor:
        """Tell tokens from padding: bool ``[B, Skv]``."""
        return self.place >= 0

    def dense_mask(self, q_len: int) -> Tensor:
        """Let queries see the past of their own sequence: bool ``[B, 1, Sq, Skv]``.

        A query that is padding sees itself, so that no softmax, nor its gradient, is nan.
        """
        owner = torch.where(self.is_real(), self.first, -1)
        token = torch.arange(owner.shape[1], device=owner.device)
        queries = slice(owner.shape[1] - q_len, None)
        mask = owner[:, queries, None] == owner[:, None]
        mask &= token[queries, None] >= token
        padding = ~self.is_real()[:, queries, None]
        mask &= ~padding | (token[queries, None] == token)
        return mask[:, None]


class _Move(torch.autograd.Function):
    """Rows by index, zero where it is -1; the gradient takes them back by the inverse index.

    So the backward is a gather too: without atomics, deterministic, and blind to padding, where a
    gradient may be nan.
    """

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor, fill: int) -> Tensor:
        return _take_rows(x, index, fill)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return _take_rows(grad, inverse, 0), None, None, None


def _take_rows(x: Tensor, index: Tensor, fill: int) -> Tensor:
    """Copy the rows ``index [B, N]`` of ``x [B, H, S, D]``: ``[B, H, N, D]``, ``fill`` at -1.

    Heads side by side, so that a row is copied whole; half the time of a gather on the CPU.
    """
    batch = torch.arange(x.shape[0], device=x.device)[:, None]
    rows = x.transpose(1, 2)[batch, index.clamp(min=0)]  # [B, N, H, D]
    return rows.masked_fill_((index < 0)[:, :, None, None], fill).transpose(1, 2)


def layout_unit(config: InfLLMConfig) -> int:
    """The least distance that keeps blocks and pooling windows where a lone sequence has them."""
    return math.lcm(config.block_size, config.coarse_stride)


def lay_out(opens: Tensor, is_real: Tensor, unit: int, kv_len: int, q_len: int) -> Layout:
    """Lay a batch out.

    Args:
        opens: bool ``[B, Skv]``, whether a sequence starts at this token.
        is_real: bool ``[B, Skv]``, false at padding. The real tokens of a sequence follow each
            other from its first on.
        unit: Sequences start at multiples of it.
        kv_len: Positions in the layout, a multiple of ``unit``. Tokens beyond are lost: the caller
            makes sure that there are none.
        q_len: Queries; they are the last ``Sq`` tokens.
    """
    B, Skv = opens.shape
    token = torch.arange(Skv, device=opens.device).expand(B, -1)
    start = torch.where(opens, token, 0).cummax(-1).values
    previous = F.pad(start[:, :-1], (1, 0))
    room = (token - previous + unit - 1) // unit * unit  # for the sequence that ends before
    first = torch.where(opens, room, 0).cumsum(-1)
    place = first + token - start
    fits = is_real & (place < kv_len)

    sequence = opens.long().cumsum(-1)
    count = torch.zeros(B, Skv + 1, dtype=torch.int64, device=opens.device)
    length = count.scatter_add(1, sequence, is_real.long()).gather(1, sequence)
    # The last column takes what has no place, and goes.
    inverse = torch.full((B, kv_len + 1), -1, dtype=torch.int64, device=opens.device)
    inverse = inverse.scatter(1, torch.where(fits, place, kv_len), token)[:, :kv_len]
    return Layout(
        unit=unit,
        offset=(Skv - q_len) // unit * unit,
        place=torch.where(fits, place, -1),
        token=inverse,
        first=first,
        length=length,
    )
