"""The queries of a micro-batch that the selection loss looks at, and where their documents lie."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from infllm_flex.config import InfLLMConfig
from infllm_flex.layout import Layout, lay_out, layout_alignment
from infllm_flex.training.data import NO_LABEL, Batch
from infllm_flex_ops.sizes import ceil_div


def draw_positions(length: int, count: int, seed: int) -> Tensor:
    """Draw one position from each of ``count`` equal parts of a sequence.

    Args:
        length: Tokens of the sequence, at least ``count``.
        count: Positions to draw.
        seed: Seed of the draws.

    Returns:
        int64 ``[count]``, ascending.
    """
    bounds = torch.arange(count + 1) * length // count
    chance = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return bounds[:-1] + (chance * bounds.diff()).long()


@dataclass(frozen=True)
class SampledQueries:
    """Some queries of each row.

    Attributes:
        token: int64 ``[n]``, their positions in the row, ascending, the same in every row.
        place: int64 ``[R, n]``, where they lie once documents start on block boundaries; ``R`` is 1
            where all rows agree, else the number of rows.
        start: int64 ``[R, n]``, where their documents start, likewise.
        counts: bool ``[R, n]``, false in documents without a label, such as padding.
        layout: Moves keys to where their documents start on block boundaries; None: they do.
    """

    token: Tensor
    place: Tensor
    start: Tensor
    counts: Tensor
    layout: Layout | None = None

    @classmethod
    def of_batch(
        cls, token: Tensor, batch: Batch, config: InfLLMConfig, device: torch.device
    ) -> SampledQueries:
        """Find the documents of the queries of a micro-batch.

        Args:
            token: int64 ``[n]`` on the CPU, positions in the rows.
            batch: The micro-batch, on the CPU.
            config: Sparsity settings.
            device: Device of the result.
        """
        if batch.position_ids is None:
            token = token.to(device)
            place = token[None]
            counts = torch.ones_like(place, dtype=torch.bool)
            return cls(token, place, torch.zeros_like(place), counts)
        opens = batch.position_ids == 0
        document = opens.long().cumsum(-1) - 1
        most = int(document.max()) + 1
        alignment = layout_alignment(config)
        length = ceil_div(opens.shape[1] + most * (alignment - 1), alignment) * alignment
        layout = lay_out(opens, torch.ones_like(opens), alignment, length, opens.shape[1])
        labels = torch.zeros(len(opens), most, dtype=torch.int64)
        labels.scatter_add_(1, document, (batch.labels != NO_LABEL).long())
        counts = labels.gather(1, document) > 0
        place, start, counts = (
            part[:, token].to(device) for part in (layout.place, layout.seq_start, counts)
        )
        return cls(token.to(device), place, start, counts, _move_layout(layout, device))


def _move_layout(layout: Layout, device: torch.device) -> Layout:
    values: dict[str, Any] = {field.name: getattr(layout, field.name) for field in fields(layout)}
    tensors: dict[str, Any] = {n: x.to(device) for n, x in values.items() if isinstance(x, Tensor)}
    return replace(layout, **tensors)
