"""What one step of training reads: tokens, what to predict, and where documents begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NO_LABEL = -100
"""Label of a token after which nothing is to be predicted; PyTorch's losses leave it out."""

_DOCUMENTS_AT_ONCE = 16


@dataclass(frozen=True)
class Batch:
    """Sequences of one length.

    Attributes:
        input_ids: int64 ``[B, S]``.
        labels: int64 ``[B, S]``, the token that follows, `NO_LABEL` where there is none: at the
            end of a document and in padding. Already shifted.
        position_ids: int64 ``[B, S]``, 0 where a document begins, so that none sees another.
            Padding is a document of its own. None where every row is one document.
        weights: float32 ``[B, S]``, how much the cost of each label counts; None: all 1. The
            weighted sum over the number of labels is what training minimises.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    weights: Tensor | None = None

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted."""
        return int((self.labels != NO_LABEL).sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; DataLoader calls this."""
        return self.map(Tensor.pin_memory)

    def rows(self, some: slice) -> Batch:
        """Some of the rows."""
        return self.map(lambda tensor: tensor[some])

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor of it changed."""
        parts = (self.input_ids, self.labels, self.position_ids, self.weights)
        return Batch(*(None if part is None else change(part) for part in parts))  # type: ignore[arg-type]

    def model_inputs(self) -> dict[str, Any]:
        """Keywords for a transformers model.

        ``position_ids`` that restart, and for a single row also ``cu_seq_lens_q/k`` and
        ``max_length_q/k`` as FlashAttention takes them. No cache: with one, transformers would not
        look at the positions, and documents would see each other.
        """
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False}
        if self.position_ids is None:
            return inputs
        inputs["position_ids"] = self.position_ids
        if len(self.input_ids) == 1:
            boundaries = document_boundaries(self.position_ids[0])
            # The length of the row, not of its longest document, so that no step recompiles.
            longest = self.input_ids.shape[1]
            inputs |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
            inputs |= {"max_length_q": longest, "max_length_k": longest}
        return inputs


def document_boundaries(position_ids: Tensor) -> Tensor:
    """Where documents begin, and the end.

    Args:
        position_ids: ``[S]``, 0 at the first token of each document.

    Returns:
        int32 ``[N + 1]``, ascending from 0 to S. As many empty documents follow as make N a
        multiple of 16, so that compiled code sees few shapes.
    """
    starts = (position_ids == 0).nonzero().flatten()
    size = -(-len(starts) // _DOCUMENTS_AT_ONCE) * _DOCUMENTS_AT_ONCE
    boundaries = torch.full((size + 1,), len(position_ids), dtype=torch.int32)
    boundaries[: len(starts)] = starts
    return boundaries.to(position_ids.device)
