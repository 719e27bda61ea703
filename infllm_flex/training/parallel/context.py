"""Context parallelism: one sequence over several processes, exactly.

A sequence is cut into ``2 N`` chunks and process r holds chunks r and ``2 N - 1 - r``: a late one,
whose queries see much, goes with an early one, so that all have the same work, dense or sparse. In
each layer the keys and values, of which grouped heads leave few, are gathered; each chunk of
queries then attends to the keys up to its own end, as the last positions of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from infllm_flex.attention import infllm_attention
from infllm_flex.config import InfLLMConfig
from infllm_flex.training.parallel.world import World

# Their names before torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

ALWAYS_DENSE = 2**31 - 1  # as dense_len


def part_of(sequences: Tensor, world: World) -> Tensor:
    """This process's two chunks, ``[B, S / N]``, of sequences ``[B, S]``."""
    if world.context == 1:
        return sequences
    chunks = sequences.chunk(2 * world.context, dim=1)
    return torch.cat([chunks[world.context_rank], chunks[-1 - world.context_rank]], dim=1)


@dataclass(frozen=True)
class _Piece:
    """Queries of this process that belong to one document.

    Attributes:
        queries: Places among this process's tokens.
        keys: Places in the whole sequence, from the document's first to the last query's own.
        dense: Whether the document is short.
    """

    queries: slice
    keys: slice
    dense: bool


class ContextAttention:
    """Attention of this process's queries to the keys of all processes of its group.

    `begin` says before each forward pass where documents begin; it holds until the backward pass
    has computed everything again that it needs.

    Args:
        config: Of the sparse attention.
        world: The processes.
    """

    def __init__(self, config: InfLLMConfig, world: World) -> None:
        self._config, self._world = config, world
        self._sparse = dataclasses.replace(config, dense_len=-1)
        self._dense = dataclasses.replace(config, dense_len=ALWAYS_DENSE)
        self._rows: list[list[_Piece]] = []  # of each row; a single list stands for all rows

    def begin(self, length: int, positions: Tensor | None) -> None:
        """Prepare for a batch.

        Args:
            length: Of its sequences.
            positions: Of all their tokens, int64 ``[B, S]`` on the CPU, 0 where a document begins.
                None where every row is one document.
        """
        documents = (
            [[0]]
            if positions is None
            else [(row == 0).nonzero().flatten().tolist() for row in positions]
        )
        self._rows = [
            sorted(
                (
                    piece
                    for start, end in pairwise([*starts, length])
                    for piece in self._pieces(start, end, length)
                ),
                key=lambda piece: piece.queries.start,
            )
            for starts in documents
        ]

    def _pieces(self, start: int, end: int, length: int) -> Iterator[_Piece]:
        """What this process holds of the document from ``start`` to ``end``."""
        rank, size = self._world.context_rank, self._world.context
        chunk = length // (2 * size)
        for place, number in enumerate((rank, 2 * size - 1 - rank)):
            first, last = max(start, number * chunk), min(end, (number + 1) * chunk)
            if first < last:
                shift = (place - number) * chunk
                # Its whole length decides, wherever this process's part of it ends.
                dense = self._config.is_dense(end - start)
                yield _Piece(slice(first + shift, last + shift), slice(start, last), dense)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attend.

        Args:
            query: ``[B, Hq, S / N, D]`` of this process's chunks.
            key: ``[B, Hkv, S / N, D]``, alike.
            value: ``[B, Hkv, S / N, D]``, alike.
            scale: Factor on the dot products. None: ``1 / sqrt(D)``.

        Returns:
            ``[B, Hq, S / N, D]``.
        """
        keys, values = self._gather(torch.stack([key, value])).unbind()
        if len(self._rows) == 1:
            return self._attend(query, keys, values, self._rows[0], scale)
        rows = zip(query.split(1), keys.split(1), values.split(1), self._rows, strict=True)
        return torch.cat([self._attend(q, k, v, pieces, scale) for q, k, v, pieces in rows])

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, pieces: list[_Piece], scale: float | None
    ) -> Tensor:
        outputs = [
            infllm_attention(
                query[:, :, piece.queries],
                key[:, :, piece.keys],
                value[:, :, piece.keys],
                self._dense if piece.dense else self._sparse,
                scale=scale,
            )
            for piece in pieces
        ]
        return torch.cat(outputs, dim=2)

    @torch.compiler.disable
    def _gather(self, both: Tensor) -> Tensor:
        """``[2, B, Hkv, S / N, D]`` of each process to ``[2, B, Hkv, S, D]`` in order."""
        parts = _AllGather.apply(both.contiguous(), self._world.group, self._world.context)
        chunks = parts.unflatten(4, (2, -1))  # [N, 2, B, Hkv, 2, S / 2N, D]
        early = chunks[:, :, :, :, 0].unbind()
        late = chunks[:, :, :, :, 1].unbind()
        return torch.cat([*early, *reversed(late)], dim=3)


class _AllGather(torch.autograd.Function):
    """Stack the parts of all processes; the gradient of a part is summed over all who used it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
        ctx.group = group
        gathered = part.new_empty((size * len(part), *part.shape[1:]))
        _all_gather(gathered, part, group=group)
        return gathered.unflatten(0, (size, -1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].contiguous()
        part = gradient.new_empty(gradient.shape[1:])
        _reduce_scatter(part, gradient.flatten(0, 1), group=ctx.group)
        return part, None, None
