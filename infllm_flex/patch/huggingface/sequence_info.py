"""Where a batch's sequences are, by the call itself or by the forward of the model around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infllm_flex.patch.forward_context import ForwardContext
from infllm_flex.patch.host_read import HostRead
from infllm_flex.patch.huggingface.masks import LazyMask
from infllm_flex.patch.layer_state import PatchedLayer
from infllm_flex.patch.running_forward import current_forward, forward_of, is_backward
from infllm_flex.validation import assert_in_graph

_LEAK = (
    "documents that only position_ids mark would see each other in this compiled call of "
    "transformers: pass use_cache=False or cu_seq_lens_q"
)
_NO_INFO_AGAIN = (
    "a checkpointed layer of this model does not get the documents again when it is recomputed: "
    "pass use_cache=False without an attention_mask, or cu_seq_lens_q, or train without gradient "
    "checkpointing"
)


class SequenceInfo(NamedTuple):
    """Everything that marks sequences in one call.

    Attributes:
        padding: bool ``[B, S]``, true for real tokens.
        positions: ``[1 or B, S]``, of the text where there are several axes.
        bounds: ``[N + 1]``, where documents start and the last one ends.
        same_bounds: The same for the keys.
        num_documents: The most documents of a row of ``positions``, where they are being counted.
        by_layer: Whether the layer's own call holds it, and not only the model around it.
        forward: The forward of the model around the layer.
    """

    padding: Tensor | None = None
    positions: Tensor | None = None
    bounds: Tensor | None = None
    same_bounds: Tensor | None = None
    num_documents: HostRead | None = None
    by_layer: bool = True
    forward: ForwardContext | None = None

    @property
    def is_empty(self) -> bool:
        """Whether every row is one sequence, as nothing says otherwise."""
        return self.padding is None and self.positions is None and self.bounds is None

    @property
    def positions_only(self) -> Tensor | None:
        """The positions, where nothing else marks documents."""
        return self.positions if self.padding is None and self.bounds is None else None


NO_INFO = SequenceInfo()


def read_sequence_info(
    query: Tensor,
    key: Tensor,
    mask: LazyMask | Tensor | None,
    kwargs: Mapping[str, Any],
    layer: PatchedLayer | None = None,
) -> SequenceInfo:
    """Collect what a call, or the forward of the model around it, tells about its sequences.

    Args:
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, Skv, D]``.
        mask: As passed to the attention function.
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
    num_documents = None
    if forward is not None:
        if positions is None and _is_of_text(forward.positions, S):
            positions = _on_device_of(query, forward.positions)
            num_documents = forward.num_documents
        elif positions is not None and positions is forward.positions:
            num_documents = forward.num_documents
        elif positions is not None and forward.counts_up:
            if not torch.compiler.is_compiling():
                forward.mark(positions)
            positions = None
        bounds = _on_device_of(query, forward.bounds) if bounds is None else bounds
    return SequenceInfo(padding, positions, bounds, same_bounds, num_documents, by_layer, forward)


def _on_device_of(query: Tensor, x: Tensor | None) -> Tensor | None:
    """Move to the device of the layer, where a model is spread over several."""
    return x if x is None or x.device == query.device else x.to(query.device)


def _is_of_text(positions: Tensor | None, length: int) -> bool:
    """Whether positions are ``[1 or B, S]``. Layers that see images may get more axes."""
    return positions is not None and positions.dim() == 2 and positions.shape[-1] == length


def assert_single_document(query: Tensor, positions: Tensor) -> Tensor:
    """Put into the graph the check that no row of positions restarts.

    Isolating documents would take a mask in every call of the graph, packed or not.

    Returns:
        ``query``, whose values depend on the check.
    """
    return assert_in_graph(query, never_decreases(positions), _LEAK)


def never_decreases(positions: Tensor) -> Tensor:
    """Whether positions ascend or stay in every row, so that each is one sequence: bool ``[]``."""
    return (positions.diff(dim=-1) >= 0).all()


def reject_recompute_without_info(
    layer: PatchedLayer, info: SequenceInfo, has_documents: bool
) -> None:
    """Refuse to recompute a layer whose forward had documents if the recomputation has none.

    Args:
        layer: The record of the layer.
        info: Information from the call.
        has_documents: Whether a row of the call holds several sequences, or padding.

    Raises:
        NotImplementedError: Recomputing would attend across documents.
    """
    if info.by_layer or torch.compiler.is_compiling():
        return
    forward = current_forward()
    if has_documents and forward is not None:
        is_training = forward.owner is not None and forward.owner.training
        layer.was_packed_by_model |= is_training or torch.is_grad_enabled()
    elif layer.was_packed_by_model and not has_documents and forward is None and is_backward():
        raise NotImplementedError(_NO_INFO_AGAIN)
