"""The loss of a causal language model in chunks, so that a long sequence's logits fit in memory."""

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
from infllm_flex_ops import torch_private

_LOGITS_PER_MIB = 2**18  # float32


class LanguageLoss(nn.Module):
    """A causal LM that returns its loss.

    FSDP and DDP wrap this module, so that they see the whole computation as one forward pass.

    Args:
        model: A transformers model.
        logits_mib: Size of one chunk of logits, in MiB of float32.

    Raises:
        ValueError: The model does not consist of a decoder and a head.
    """

    model: Any
    _head: Any

    def __init__(self, model: Any, logits_mib: int = 64) -> None:
        super().__init__()
        self.model = model
        self._chunk_rows = max(1, logits_mib * _LOGITS_PER_MIB // model.config.vocab_size)
        # Not registered as a submodule, because it shares the model's submodules.
        object.__setattr__(self, "_head", head_of(model))

    def forward(self, labels: Tensor, weights: Tensor | None = None, **inputs: Any) -> Tensor:
        """Sum the loss over all labels; the chunks of long sequences are recomputed in backward.

        Args:
            labels: int64 ``[B, S]``, the token that follows each; `NO_LABEL` to ignore one.
            weights: ``[B, S]``, factors on the loss of each label; None: 1.
            inputs: Keyword arguments of the model: ``input_ids`` and others.

        Returns:
            The sum in nats, float32 ``[]``; with weights, the weighted and the plain sum, ``[2]``.
        """
        outputs = self.model.get_decoder()(**inputs)
        hidden, targets = outputs.last_hidden_state.flatten(0, 1), labels.flatten()
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        output_type: Callable[..., Any] = type(outputs)
        make_outputs = functools.partial(output_type, **others)
        factors = None if weights is None else weights.flatten()
        rows = self._chunk_rows
        if len(hidden) <= rows:
            return self._chunk_loss(hidden, targets, factors, make_outputs)
        total = hidden.new_zeros(() if weights is None else 2, dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            tensors = (hidden[chunk], targets[chunk], None if factors is None else factors[chunk])
            total = total + checkpoint(
                self._chunk_loss, *tensors, make_outputs, use_reentrant=False
            )
        return total

    def _chunk_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        make_outputs: Callable[..., Any],
    ) -> Tensor:
        outputs = make_outputs(last_hidden_state=hidden[None])
        logits = self._head(inputs_embeds=outputs, use_cache=False).logits[0].float()
        if weights is None:
            return F.cross_entropy(logits, labels, reduction="sum", ignore_index=NO_LABEL)
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=NO_LABEL)
        return torch.stack([(losses * weights).sum(), losses.sum()])


class _Identity(nn.Module):
    """Replaces the decoder and returns ``inputs_embeds``."""

    def forward(self, inputs_embeds: Any, **_: Any) -> Any:
        return inputs_embeds


def head_of(model: Any) -> Any:
    """The model's own computation from the decoder's outputs to the logits, scaling included.

    Returns:
        A module that takes the decoder's outputs as ``inputs_embeds``.

    Raises:
        ValueError: The model does not consist of a decoder and a head.
    """
    decoder = model.get_decoder()
    names = [name for name, child in model.named_children() if child is decoder]
    if not names:
        raise ValueError(
            f"{type(model).__name__} does not consist of a decoder and a head, so that its loss "
            "cannot be computed in chunks: train a model whose get_decoder() is one of its children"
        )
    head = copy.copy(model)
    torch_private.replace_child(head, names[0], _Identity())
    return head
