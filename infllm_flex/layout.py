"""Lay out padded and packed batches as sequences that start on a block boundary, and undo it.

Every sequence (a padded row, or a document of a packed one) moves so that its first token lands on
a multiple of ``alignment`` tokens. Its blocks, pooling windows and tiles are then those it has
alone. Everything is computed on the device, and sizes depend on shapes alone.
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
        alignment: Sequences start at multiples of it, in tokens.
        q_offset: Position of the first query in the layout; the queries are its last positions.
        place: int64 ``[B, Skv]``, the position of each token in the layout, -1 for padding.
        token: int64 ``[B, Skv']``, the token at each position of the layout, -1 where there is
            none. ``Skv'`` is a multiple of ``alignment``.
        seq_start: int64 ``[B, Skv]``, the position of the first token of each token's sequence.
        seq_len: int64 ``[B, Skv]``, the tokens in each token's sequence.
    """

    alignment: int
    q_offset: int
    place: Tensor
    token: Tensor
    seq_start: Tensor
    seq_len: Tensor

    def move_keys(self, x: Tensor) -> Tensor:
        """Lay out ``[B, H, Skv, D]`` as ``[B, H, Skv', D]``, zero where there is no token."""
        return _Move.apply(x, self.token, self.place, 0)

    def move_queries(self, x: Tensor, fill: int = 0) -> Tensor:
        """Lay out ``[B, H, Sq, D]``, the last tokens, as the last positions ``[B, H, Sq', D]``."""
        token, place = self._query_indices(x.shape[2])
        return _Move.apply(x, token, place, fill)

    def move_back(self, x: Tensor, q_len: int, fill: int = 0) -> Tensor:
        """Return ``[B, H, Sq', D]`` to ``[B, H, Sq, D]``, ``fill`` at padding."""
        token, place = self._query_indices(q_len)
        return _Move.apply(x, place, token, fill)

    def _query_indices(self, q_len: int) -> tuple[Tensor, Tensor]:
        first_query = self.place.shape[1] - q_len
        return (
            (self.token[:, self.q_offset :] - first_query).clamp(min=-1),
            (self.place[:, first_query:] - self.q_offset).clamp(min=-1),
        )

    def documents(self, config: InfLLMConfig, *, dense_slots: int = 0) -> Tensor:
        """Write the table of documents that the operator ``select_blocks`` reads.

        Args:
            config: Sparsity settings.
            dense_slots: Blocks that suffice for any dense sequence; 0 makes no sequence dense.

        Returns:
            int32 ``[B, Skv' / alignment, 3]``. For each part of the layout: the first position of
            its sequence, the position after the last one, and the budget of a query in blocks.
        """
        # Sequences start at the first token of a part, so a part without one is empty.
        token = self.token[:, :: self.alignment]
        real = token.clamp(min=0)
        start, length = self.seq_start.gather(1, real), self.seq_len.gather(1, real)
        budget = torch.full_like(length, config.num_selected)
        if dense_slots:
            budget = torch.where(length < config.dense_len, dense_slots, budget)
        table = torch.stack([start, start + length, budget], -1)
        return torch.where((token >= 0)[..., None], table, 0).int()

    def move_selected(
        self, selected: Tensor, config: InfLLMConfig, dense_slots: int, *, by_position: bool
    ) -> Tensor:
        """Lay out a selection ``[B, Hkv, Sq, K]`` numbered by sequence, in blocks of the layout.

        Dense queries get all their blocks, whatever was selected; see ``list_dense``.
        """
        start_block = self.start_block(config.block_size, selected.shape[2])[:, None, :, None]
        selected = torch.where(selected < 0, -1, selected + start_block)
        selected = self.move_queries(selected, fill=-1)
        return self.list_dense(selected, config, dense_slots, by_position=by_position)

    def list_dense(
        self,
        selected: Tensor,
        config: InfLLMConfig,
        dense_slots: int,
        *,
        by_position: bool,
    ) -> Tensor:
        """Select every block of its past for a query that is dense, whatever was selected.

        Args:
            selected: ``[B, Hkv, Sq', K]`` in blocks of the layout.
            config: Sparsity settings.
            dense_slots: Blocks that suffice for any dense query; 0 where none is dense.
            by_position: Whether the tokens up to a query decide if it is dense; else all tokens
                of its sequence do.
        """
        if not dense_slots:
            return selected
        missing = max(0, dense_slots - selected.shape[3])
        selected = F.pad(selected, (0, missing), value=-1)
        parts = self.documents(config).repeat_interleave(self.alignment, 1)[:, self.q_offset :]
        start, end, _ = parts[:, None, :, None].unbind(-1)  # each [B, 1, Sq', 1]
        slot = torch.arange(selected.shape[3], device=selected.device, dtype=torch.int32)
        position = torch.arange(self.q_offset, self.token.shape[1], device=selected.device)[:, None]
        block = start // config.block_size + slot
        seen = (block * config.block_size <= position) & (position < end)
        everything = torch.where(seen, block, -1)
        length = position + 1 - start if by_position else end - start
        return torch.where(length < config.dense_len, everything, selected)

    def start_block(self, block_size: int, q_len: int) -> Tensor:
        """Return, for every query, the block its sequence starts at: int32 ``[B, Sq]``."""
        return (self.seq_start[:, self.seq_start.shape[1] - q_len :] // block_size).int()

    def is_real(self) -> Tensor:
        """Return which tokens are not padding: bool ``[B, Skv]``."""
        return self.place >= 0

    def dense_mask(self, q_len: int) -> Tensor:
        """Make a mask by which queries see the past of their sequence: bool ``[B, 1, Sq, Skv]``.

        A query that is padding sees itself, so that no softmax and no gradient of one is nan.
        """
        owner = torch.where(self.is_real(), self.seq_start, -1)
        token = torch.arange(owner.shape[1], device=owner.device)
        queries = slice(owner.shape[1] - q_len, None)
        mask = owner[:, queries, None] == owner[:, None]
        mask &= token[queries, None] >= token
        padding = ~self.is_real()[:, queries, None]
        mask &= ~padding | (token[queries, None] == token)
        return mask[:, None]


class _Move(torch.autograd.Function):
    """Gather rows by index, ``fill`` where it is -1; the gradient gathers by the inverse index.

    A backward that gathers needs no atomics, is deterministic, and never reads the gradient of
    padding, which may be nan.
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

    It copies all heads of a token at once, so that each copy is one long run of memory.
    """
    batch = torch.arange(x.shape[0], device=x.device)[:, None]
    rows = x.transpose(1, 2)[batch, index.clamp(min=0)]  # [B, N, H, D]
    return rows.masked_fill_((index < 0)[:, :, None, None], fill).transpose(1, 2)


def layout_alignment(config: InfLLMConfig) -> int:
    """Return the least alignment at which a sequence keeps the blocks and windows it has alone."""
    return math.lcm(config.block_size, config.coarse_stride)


def lay_out(opens: Tensor, is_real: Tensor, alignment: int, kv_len: int, q_len: int) -> Layout:
    """Lay out a batch.

    Args:
        opens: bool ``[B, Skv]``, whether a sequence starts at this token.
        is_real: bool ``[B, Skv]``, false at padding. The real tokens of a sequence are one run that
            begins where it opens.
        alignment: Sequences start at multiples of it.
        kv_len: Positions in the layout, a multiple of ``alignment``. Tokens beyond it are lost: the
            caller makes sure that there are none.
        q_len: Queries; they are the last ``Sq`` tokens.
    """
    B, Skv = opens.shape
    token = torch.arange(Skv, device=opens.device).expand(B, -1)
    start = torch.where(opens, token, 0).cummax(-1).values
    previous = F.pad(start[:, :-1], (1, 0))
    # Positions that the sequence before this token takes.
    taken = (token - previous + alignment - 1) // alignment * alignment
    seq_start = torch.where(opens, taken, 0).cumsum(-1)
    place = seq_start + token - start
    fits = is_real & (place < kv_len)

    sequence = opens.long().cumsum(-1)
    count = torch.zeros(B, Skv + 1, dtype=torch.int64, device=opens.device)
    seq_len = count.scatter_add(1, sequence, is_real.long()).gather(1, sequence)
    # Tokens without a place go to one more column, which is cut off.
    inverse = torch.full((B, kv_len + 1), -1, dtype=torch.int64, device=opens.device)
    inverse = inverse.scatter(1, torch.where(fits, place, kv_len), token)[:, :kv_len]
    return Layout(
        alignment=alignment,
        q_offset=(Skv - q_len) // alignment * alignment,
        place=torch.where(fits, place, -1),
        token=inverse,
        seq_start=seq_start,
        seq_len=seq_len,
    )
