"""What a patched attention layer remembers: one record, an ordinary attribute of the module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.dense_blocks import DenseBlocks, Switchable

_ATTRIBUTE = "infllm_layer"
NOT_PATCHED = "not patched"  # why a layer is left that nobody asked to be sparse
# Query, key, value and scale to the output, as `infllm_attention` takes and returns them.
Attend = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
# The number of a layer, from 0, to what attends in it.
LayerAttend = Callable[[int], Attend]


@dataclass
class PatchedLayer(Switchable):
    """The settings of one attention layer.

    It holds no tensor and no back reference, and lives in the module's ``__dict__``: checkpoints
    and ``state_dict`` never see it, ``copy.deepcopy`` of the model carries it along, and two models
    never share one.

    Attributes:
        config: Settings of the sparse attention.
        dense_attention: The attention functions a transformers layer may have had before, by the
            name of their implementation; none for layers whose own call is intercepted.
        left: Why the layer stays as it was; None for a layer that turns sparse.
        reads_positions: Whether this layer checks ``position_ids`` on behalf of all others.
        was_packed_by_model: Whether it was ever trained on documents that only the model around it
            was told of.
        blocks: The ``dense`` blocks that the layer is inside, in each thread.
        num_blocks: Their number in all threads.
        way: How the layer is reached.
        query_heads: Query heads of the whole layer, where the model says; None elsewhere.
        kv_heads: Key/value heads before the model expands them to the query heads, alike.
        head_order: How it expands them, once a call has shown it (`infllm_flex.patch.heads`).
        origin: Where the settings come from, in words.
        attend: What attends in the layer's place, inside an ``attend_through`` block.
    """

    config: InfLLMConfig
    dense_attention: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    left: str | None = None
    reads_positions: bool = True
    was_packed_by_model: bool = False
    blocks: DenseBlocks = field(default_factory=DenseBlocks, compare=False)
    num_blocks: int = 0
    way: str = "transformers"
    query_heads: int | None = None
    kv_heads: int | None = None
    head_order: str | None = None
    origin: str = ""
    attend: Attend | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchedLayer:
        return dataclasses.replace(self, **_outside_blocks())

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), **_outside_blocks(), "blocks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, blocks=DenseBlocks())

    def ever_attends_sparsely(self, capacity: int) -> bool:
        """Whether a sequence of at most ``capacity`` keys may be sparse here."""
        return self.left is None and not self.config.is_dense(capacity)

    def attends_densely(self, length: int) -> bool:
        """Whether the layer does what it did before patching, at ``length`` keys."""
        return self.left is not None or self.config.is_dense(length) or self.is_inside_block()


def _outside_blocks() -> dict[str, Any]:
    """What a copy is made with: no block would ever end for it."""
    return {"blocks": DenseBlocks(), "num_blocks": 0, "attend": None}


def get_layer(module: nn.Module) -> PatchedLayer | None:
    """The record of a module, or None where it has none."""
    return getattr(module, _ATTRIBUTE, None)


def set_layer(module: nn.Module, layer: PatchedLayer) -> None:
    """Give a module its record, or renew the one it has."""
    existing = get_layer(module)
    if existing is None:
        setattr(module, _ATTRIBUTE, layer)
    else:
        # The same object: a block around this call holds on to it, to end it.
        kept = {name: getattr(existing, name) for name in _outside_blocks()}
        vars(existing).update({**vars(layer), **kept})


def remove_layer(module: nn.Module) -> None:
    """Take the record of a module away."""
    if get_layer(module) is not None:
        delattr(module, _ATTRIBUTE)
