"""Context parallelism: exact attention over sequences split among several processes.

A sequence is split into ``2 N`` chunks, and rank r of the context group holds chunks r and
``2 N - 1 - r``. A late chunk, whose queries attend to many keys, is paired with an early one, which
balances the work of dense and sparse attention. Each layer gathers the keys and values of all
processes, which are small with grouped heads. Each chunk of queries then attends to the keys up to
its own end.
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

# torch 2.13 renamed both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

ALWAYS_DENSE = 2**31 - 1  # a dense_len above every length


def local_chunks(sequences: Tensor, world: World) -> Tensor:
    """The two chunks of this process, ``[B, S / N]``, of sequences ``[B, S]``."""
    if world.context == 1:
        return sequences
    chunks = sequences.chunk(2 * world.context, dim=1)
    return torch.cat([chunks[world.context_rank], chunks[-1 - world.context_rank]], dim=1)


@dataclass(frozen=True)
class _Segment:
    """Consecutive queries of this process that belong to one document.

    Attributes:
        queries: Their positions among the tokens of this process.
        keys: Positions in the whole sequence, from the start of the document to the last query.
        config: Settings by which these queries attend as they do in the whole document.
    """

    queries: slice
    keys: slice
    config: InfLLMConfig


class ContextAttention:
    """Attention of this process's queries to the keys of its context group.

    `set_documents` must be called before each forward pass. Its documents stay in force through
    the recomputation of the backward pass.

    Args:
        config: Settings of the sparse attention.
        world: The processes.
    """

    def __init__(self, config: InfLLMConfig, world: World) -> None:
        self._config, self._world = config, world
        self._sparse = dataclasses.replace(config, dense_len=-1)
        self._dense = dataclasses.replace(config, dense_len=ALWAYS_DENSE)
        self._rows: list[list[_Segment]] = []  # one list per row, or a single list for all rows

    def set_documents(self, length: int, positions: Tensor | None) -> None:
        """Set the document boundaries of the next batch.

        Args:
            length: Tokens per sequence.
            positions: int64 ``[B, S]`` on the CPU, 0 at the start of each document. None: every
                row is one document.
        """
        documents = (
            [[0]]
            if positions is None
            else [(row == 0).nonzero().flatten().tolist() for row in positions]
        )
        self._rows = [
            sorted(
                (
                    segment
                    for start, end in pairwise([*starts, length])
                    for segment in self._segments(start, end, length)
                ),
                key=lambda segment: segment.queries.start,
            )
            for starts in documents
        ]

    def _segments(self, start: int, end: int, length: int) -> Iterator[_Segment]:
        """The segments that this process holds of the document from ``start`` to ``end``."""
        rank, size = self._world.context_rank, self._world.context
        chunk = length // (2 * size)
        for place, number in enumerate((rank, 2 * size - 1 - rank)):
            first, stop = max(start, number * chunk), min(end, (number + 1) * chunk)
            if first < stop:
                shift = (place - number) * chunk
                queries = slice(first + shift, stop + shift)
                yield _Segment(queries, slice(start, stop), self._settings(end - start))

    def _settings(self, length: int) -> InfLLMConfig:
        """The settings for parts of a document of ``length`` tokens."""
        if self._config.dense_by == "position":
            return self._config  # which does not depend on what follows a part
        return self._dense if self._config.is_dense(length) else self._sparse

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attend.

        Args:
            query: ``[B, Hq, S / N, D]``, the chunks of this process.
            key: ``[B, Hkv, S / N, D]``, the chunks of this process.
            value: ``[B, Hkv, S / N, D]``, the chunks of this process.
            scale: Factor on the dot products. None: ``1 / sqrt(D)``.

        Returns:
            ``[B, Hq, S / N, D]``.
        """
        keys, values = self._gather(torch.stack([key, value])).unbind()
        if len(self._rows) == 1:
            return self._attend(query, keys, values, self._rows[0], scale)
        rows = zip(query.split(1), keys.split(1), values.split(1), self._rows, strict=True)
        return torch.cat([self._attend(q, k, v, segments, scale) for q, k, v, segments in rows])

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: list[_Segment],
        scale: float | None,
    ) -> Tensor:
        outputs = [
            infllm_attention(
                query[:, :, segment.queries],
                key[:, :, segment.keys],
                value[:, :, segment.keys],
                segment.config,
                scale=scale,
            )
            for segment in segments
        ]
        return torch.cat(outputs, dim=2)

    @torch.compiler.disable
    def _gather(self, keys_and_values: Tensor) -> Tensor:
        """Gather ``[2, B, Hkv, S / N, D]`` of each process to ``[2, B, Hkv, S, D]`` in order."""
        parts = _AllGather.apply(
            keys_and_values.contiguous(), self._world.group, self._world.context
        )
        chunks = parts.unflatten(4, (2, -1))  # [N, 2, B, Hkv, 2, S / 2N, D]
        early = chunks[:, :, :, :, 0].unbind()
        late = chunks[:, :, :, :, 1].unbind()
        return torch.cat([*early, *reversed(late)], dim=3)


class _AllGather(torch.autograd.Function):
    """Stack the parts of all processes; the gradient of a part is summed over the processes."""

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
