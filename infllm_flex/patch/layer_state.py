"""The record of a patched attention layer: one object, an ordinary attribute of the module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.dense_context import DenseSwitch, OpenContexts

_ATTRIBUTE = "infllm_layer"
NOT_PATCHED = "not patched"  # skip reason of a layer that nobody asked to be sparse
# Query, key, value and scale to the output, as `infllm_attention` takes and returns them.
Attend = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
# The number of a layer, from 0, to its attention function.
LayerAttend = Callable[[int], Attend]
# Output, query, key and scale to the output that the layer goes on with.
Observe = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
# The number of a layer, from 0, to what observes its attention.
LayerObserve = Callable[[int], Observe]


@dataclass
class PatchedLayer(DenseSwitch):
    """The settings and the memory of one attention layer.

    It holds no tensor and no back reference, and lives in the module's ``__dict__``. Checkpoints
    and ``state_dict`` never see it, ``copy.deepcopy`` of the model copies it, and two models never
    share one.

    Attributes:
        config: Settings of the sparse attention.
        dense_attention: A transformers layer's possible previous attention functions, by the name
            of their implementation. Empty for layers whose own SDPA call is intercepted.
        skip_reason: Why the layer stays dense; None for a layer that turns sparse.
        was_packed_by_model: Whether it was ever trained on documents that only the model around it
            knew of.
        last_batch_was_packed: Whether the last batch read held several sequences in a row. It only
            decides whether to launch a speculative dense call.
        open_contexts: The ``dense`` contexts that the layer is in, per thread.
        num_contexts: Their number in all threads.
        adapter: Name of the adapter that serves the layer.
        query_heads: Query heads of the whole layer, where the model says; None elsewhere.
        kv_heads: Key/value heads before the model expands them to the query heads; None likewise.
        head_order: How the model expands them, once a call has shown it (`patch.head_groups`).
        origin: Where the settings come from, in words.
        attend: The function that replaces the layer's attention inside ``attend_through``.
        observe: The function that gets the layer's output inside ``observe_attention``.
    """

    config: InfLLMConfig
    dense_attention: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    skip_reason: str | None = None
    was_packed_by_model: bool = False
    last_batch_was_packed: bool = False
    open_contexts: OpenContexts = field(default_factory=OpenContexts, compare=False)
    num_contexts: int = 0
    adapter: str = "transformers"
    query_heads: int | None = None
    kv_heads: int | None = None
    head_order: str | None = None
    origin: str = ""
    attend: Attend | None = None
    observe: Observe | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchedLayer:
        return dataclasses.replace(self, **_outside_contexts())

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), **_outside_contexts(), "open_contexts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, open_contexts=OpenContexts())

    def ever_attends_sparsely(self, capacity: int) -> bool:
        """Whether a sequence of at most ``capacity`` keys may be sparse here."""
        return self.skip_reason is None and not self.config.is_dense(capacity)

    def attends_densely(self, length: int) -> bool:
        """Whether the layer does what it did before patching, at ``length`` keys.

        Raises:
            NotImplementedError: It is sparse, and ``torch.jit.trace`` runs the model.
        """
        if self.skip_reason is not None or self.config.is_dense(length):
            return True
        if self.is_in_dense_context():
            return True
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise NotImplementedError(
                f"torch.jit.trace cannot record sparse attention: got {int(length)} keys with "
                f"dense_len = {self.config.dense_len}; use torch.export, or trace inside "
                "infllm_flex.dense(model) for a graph that is dense at every length"
            )
        return False


def _outside_contexts() -> dict[str, Any]:
    """Fields of a copy: no open context would ever end for it."""
    return {"open_contexts": OpenContexts(), "num_contexts": 0, "attend": None, "observe": None}


def get_layer(module: nn.Module) -> PatchedLayer | None:
    """The record of an attention layer, or None where it has none."""
    return getattr(module, _ATTRIBUTE, None)


def own_layer(module: nn.Module) -> PatchedLayer | None:
    """The same for any module: one that passes on attributes of a layer inside it has none."""
    return vars(module).get(_ATTRIBUTE)


def set_layer(module: nn.Module, layer: PatchedLayer) -> None:
    """Give a module its record, or renew the one it has."""
    existing = get_layer(module)
    if existing is None:
        setattr(module, _ATTRIBUTE, layer)
    else:
        # Keep the object: an open context holds a reference to it.
        kept = {name: getattr(existing, name) for name in _outside_contexts()}
        vars(existing).update({**vars(layer), **kept})


def remove_layer(module: nn.Module) -> None:
    """Delete the record of a module."""
    vars(module).pop(_ATTRIBUTE, None)
