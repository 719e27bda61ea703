"""The loss of a causal language model, without ever holding the logits of a long sequence."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infllm_flex.training.data import NO_LABEL

_PER_MIB = 2**18  # logits in float32


class LanguageLoss(nn.Module):
    """A causal LM that returns its loss.

    One module, so that what wraps it (FSDP, DDP) sees the whole computation as one forward.

    Args:
        model: A transformers model.
        logits_mib: Logits that are in memory at once, in MiB of float32.

    Raises:
        ValueError: The model is not a decoder and a head.
    """

    model: Any
    _head: Any

    def __init__(self, model: Any, logits_mib: int = 64) -> None:
        super().__init__()
        self.model = model
        self._rows = max(1, logits_mib * _PER_MIB // model.config.vocab_size)
        # No submodule: its parts are those of the model.
        object.__setattr__(self, "_head", head_of(model))

    def forward(self, labels: Tensor, weights: Tensor | None = None, **inputs: Any) -> Tensor:
        """Add up the cost of all labels, long sequences in parts that the backward makes again.

        Args:
            labels: int64 ``[B, S]``, the token that follows each; `NO_LABEL` where none counts.
            weights: ``[B, S]``, factors on the cost of each label; None: 1.
            inputs: What the model is given: ``input_ids`` and what goes with them.

        Returns:
            The sum in nats, float32; with weights two of them, weighted and not, ``[2]``.
        """
        outputs = self.model.get_decoder()(**inputs)
        hidden, goals = outputs.last_hidden_state.flatten(0, 1), labels.flatten()
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        kind: Callable[..., Any] = type(outputs)
        make = functools.partial(kind, **others)
        factors = None if weights is None else weights.flatten()
        rows = self._rows
        if len(hidden) <= rows:
            return self._cost(hidden, goals, factors, make)
        total = hidden.new_zeros(() if weights is None else 2, dtype=torch.float32)
        for first in range(0, len(hidden), rows):
            some = slice(first, first + rows)
            part = (hidden[some], goals[some], None if factors is None else factors[some])
            total = total + checkpoint(self._cost, *part, make, use_reentrant=False)
        return total

    def _cost(
        self, hidden: Tensor, labels: Tensor, weights: Tensor | None, make: Callable[..., Any]
    ) -> Tensor:
        outputs = make(last_hidden_state=hidden[None])
        logits = self._head(inputs_embeds=outputs, use_cache=False).logits[0].float()
        if weights is None:
            return F.cross_entropy(logits, labels, reduction="sum", ignore_index=NO_LABEL)
        costs = F.cross_entropy(logits, labels, reduction="none", ignore_index=NO_LABEL)
        return torch.stack([(costs * weights).sum(), costs.sum()])


class _AsGiven(nn.Module):
    """Stands in a decoder's place and returns what it is given for an input."""

    def forward(self, inputs_embeds: Any, **_: Any) -> Any:
        return inputs_embeds


def head_of(model: Any) -> Any:
    """A model's own way from the decoder's outputs to the logits, with all scaling on it.

    Returns:
        A module that takes the decoder's outputs as ``inputs_embeds``.

    Raises:
        ValueError: The model is not a decoder and a head.
    """
    decoder = model.get_decoder()
    names = [name for name, child in model.named_children() if child is decoder]
    if not names:
        raise ValueError(
            f"{type(model).__name__} is not a decoder and a head: its loss cannot be taken in parts"
        )
    head = copy.copy(model)
    head._modules = {**model._modules, names[0]: _AsGiven()}
    return head
