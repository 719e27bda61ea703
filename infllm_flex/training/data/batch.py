"""A batch: tokens, labels and document boundaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NO_LABEL = -100
"""Label that the loss ignores; PyTorch's default ``ignore_index``."""

_BOUNDARY_MULTIPLE = 16


@dataclass(frozen=True)
class Batch:
    """Sequences of one length.

    Attributes:
        input_ids: int64 ``[B, S]``.
        labels: int64 ``[B, S]``, already shifted: the next token, or `NO_LABEL` at the end of a
            document and in padding.
        position_ids: int64 ``[B, S]``, 0 at the start of each document; documents do not attend to
            each other. Padding is a document of its own. None: every row is one document.
        weights: float32 ``[B, S]``, factors on the loss of each label; None: all 1. Training
            minimises the weighted sum divided by the number of labels.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    weights: Tensor | None = None

    @property
    def num_labels(self) -> int:
        """Number of labels that count."""
        return int((self.labels != NO_LABEL).sum())

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device."""
        return self.map(lambda tensor: tensor.to(device))

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory; DataLoader calls this."""
        return self.map(Tensor.pin_memory)

    def rows(self, which: slice) -> Batch:
        """A slice of the rows."""
        return self.map(lambda tensor: tensor[which])

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor of the batch."""
        parts = (self.input_ids, self.labels, self.position_ids, self.weights)
        return Batch(*(None if part is None else change(part) for part in parts))  # type: ignore[arg-type]

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for a transformers model.

        With several documents: ``position_ids`` that restart, and for a single row also
        FlashAttention's ``cu_seq_lens_q/k`` and ``max_length_q/k``. The cache is off, because with
        one, transformers ignores restarting positions and documents would attend to each other.
        """
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False}
        if self.position_ids is None:
            return inputs
        inputs["position_ids"] = self.position_ids
        if len(self.input_ids) == 1:
            boundaries = document_boundaries(self.position_ids[0])
            # The length of the row instead of its longest document avoids recompilation.
            longest = self.input_ids.shape[1]
            inputs |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
            inputs |= {"max_length_q": longest, "max_length_k": longest}
        return inputs


def document_boundaries(position_ids: Tensor) -> Tensor:
    """The start of each document, and the end of the last, as ``cu_seqlens``.

    Args:
        position_ids: ``[S]``, 0 at the first token of each document.

    Returns:
        int32 ``[N + 1]``, ascending from 0 to S. Empty documents at the end pad N to a multiple of
        16, so that compiled code sees few shapes.
    """
    starts = (position_ids == 0).nonzero().flatten()
    size = -(-len(starts) // _BOUNDARY_MULTIPLE) * _BOUNDARY_MULTIPLE
    boundaries = torch.full((size + 1,), len(position_ids), dtype=torch.int32)
    boundaries[: len(starts)] = starts
    return boundaries.to(position_ids.device)
