"""What a call tells about the sequences of its batch, itself or by the model around its layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import infllm_flex_ops
from infllm_flex.patch.forward_context import (
    ForwardContext,
    current_forward,
    forward_of,
    is_backward,
)
from infllm_flex.patch.huggingface.masks import LazyMask
from infllm_flex.patch.layer_state import PatchedLayer

if TYPE_CHECKING:
    from infllm_flex.patch.huggingface.documents import Sequences

_LEAK = (
    "transformers would let documents told by position_ids alone see each other in this compiled "
    "call: pass use_cache=False or cu_seq_lens_q"
)
_NOT_TOLD_AGAIN = (
    "a checkpointed layer of this model is not told of documents again when it is recomputed: pass "
    "use_cache=False without an attention_mask, or cu_seq_lens_q, or train without gradient "
    "checkpointing"
)


class SequenceInfo(NamedTuple):
    """What a call tells about its sequences.

    Attributes:
        padding: bool ``[B, S]``, true for real tokens.
        positions: ``[1 or B, S]``, of the text where there are several axes.
        bounds: ``[N + 1]``, where documents start and the last one ends.
        same_bounds: The same for the keys.
        by_layer: Whether the layer itself was told, not only the model around it.
        forward: That of the model around it.
    """

    padding: Tensor | None = None
    positions: Tensor | None = None
    bounds: Tensor | None = None
    same_bounds: Tensor | None = None
    by_layer: bool = True
    forward: ForwardContext | None = None

    @property
    def positions_only(self) -> Tensor | None:
        """The positions, where nothing else would tell of documents."""
        return self.positions if self.padding is None and self.bounds is None else None


NO_INFO = SequenceInfo()


def read_sequence_info(
    query: Tensor,
    key: Tensor,
    mask: LazyMask | Tensor | None,
    kwargs: Mapping[str, Any],
    layer: PatchedLayer | None = None,
) -> SequenceInfo:
    """What a call, or the forward of the model around it, tells about its sequences.

    Args:
        query: ``[B, Hq, Sq, D]``.
        key: ``[B, Hkv, Skv, D]``.
        mask: As handed to the attention function.
        kwargs: The other keywords of the call.
        layer: The record of the layer, where it may be part of a model without hooks.
    """
    S = query.shape[2]
    if key.shape[2] != S or S == 1:
        return NO_INFO
    padding = mask.padding if isinstance(mask, LazyMask) else None
    bounds, same_bounds = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    given = kwargs.get("position_ids")
    positions = given if _is_of_text(given, S) else None
    by_layer = positions is not None or bounds is not None
    forward = forward_of((given, bounds, padding, mask), layer)
    if forward is not None:
        if positions is None and _is_of_text(forward.positions, S):
            positions = _on_device_of(query, forward.positions)
        elif positions is not None and forward.counts_up:
            if not torch.compiler.is_compiling():
                forward.mark(positions)
            positions = None
        bounds = _on_device_of(query, forward.bounds) if bounds is None else bounds
    return SequenceInfo(padding, positions, bounds, same_bounds, by_layer, forward)


def _on_device_of(query: Tensor, x: Tensor | None) -> Tensor | None:
    """The same on the device of the layer, where a model is spread over several."""
    return x if x is None or x.device == query.device else x.to(query.device)


def _is_of_text(positions: Tensor | None, length: int) -> bool:
    """Whether positions are ``[1 or B, S]``. What a layer gets over images may have more axes."""
    return positions is not None and positions.dim() == 2 and positions.shape[-1] == length


def assert_single_document(query: Tensor, positions: Tensor) -> Tensor:
    """The query, and in the graph the check that no row of positions restarts.

    Taking the mask down for a graph's every call would cost all those that are not packed.
    """
    return query + infllm_flex_ops.zero_if(never_decreases(positions), _LEAK)


def never_decreases(positions: Tensor) -> Tensor:
    """Whether positions ascend or stay in every row, so that each is one sequence: bool ``[]``."""
    return (positions.diff(dim=-1) >= 0).all()


def reject_recompute_without_info(
    layer: PatchedLayer, info: SequenceInfo, sequences: Sequences | None
) -> None:
    """Refuse to recompute a layer that has been given documents, and is not told of them again.

    Args:
        layer: The record of the layer.
        info: What the call tells.
        sequences: What was found in it.
    """
    if info.by_layer or torch.compiler.is_compiling():
        return
    forward = current_forward()
    if sequences is not None and forward is not None:
        is_training = forward.owner is not None and forward.owner.training
        layer.was_packed_by_model |= is_training or torch.is_grad_enabled()
    elif layer.was_packed_by_model and sequences is None and forward is None and is_backward():
        raise NotImplementedError(_NOT_TOLD_AGAIN)
