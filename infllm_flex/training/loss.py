"""The loss of a causal language model, without ever holding the logits of a long sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infllm_flex.training.data import NO_LABEL

_LOGITS_AT_ONCE = 2**24  # 64 MiB of float32


class LanguageLoss(nn.Module):
    """A causal LM that returns its loss.

    One module, so that what wraps it (FSDP, DDP) sees the whole computation as one forward.

    Args:
        model: A transformers model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor, **inputs: Any) -> Tensor:
        """Add up the cost of all labels.

        Args:
            labels: int64 ``[B, S]``, the token that follows each; `NO_LABEL` where none counts.
            inputs: What the model is given: ``input_ids`` and what goes with them.

        Returns:
            The sum in nats, float32.
        """
        head = self.model.get_output_embeddings()
        decoder = self.model.get_decoder()
        hidden = decoder(**inputs).last_hidden_state
        return cost(hidden.flatten(0, 1), head.weight, labels.flatten(), head.bias)


def cost(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """Summed cross-entropy of a linear head; long inputs in chunks, computed again in the backward.

    Args:
        hidden: ``[N, H]``.
        weight: ``[V, H]`` of the head.
        labels: int64 ``[N]``.
        bias: ``[V]``.

    Returns:
        float32 scalar.
    """
    rows = max(1, _LOGITS_AT_ONCE // len(weight))
    if len(hidden) <= rows:
        return _cost(hidden, weight, labels, bias)
    total = hidden.new_zeros((), dtype=torch.float32)
    for some, goal in zip(hidden.split(rows), labels.split(rows), strict=True):
        total = total + checkpoint(_cost, some, weight, goal, bias, use_reentrant=False)
    return total


def _cost(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    logits = F.linear(hidden, weight, bias).float()
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=NO_LABEL)
