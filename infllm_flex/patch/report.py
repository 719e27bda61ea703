"""The outcome of patching for each attention layer, as rows and as a table."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import discovery
from infllm_flex.patch.discovery import AttentionModule
from infllm_flex.patch.layer_state import PatchedLayer, own_layer
from infllm_flex.patch.unsupported import require_module


class LayerRow(NamedTuple):
    """One attention layer.

    Attributes:
        name: Name of the module, as in ``named_modules``.
        patched_through: Name of the adapter, such as ``"transformers"``; empty if the layer is not
            patched.
        sparse: Whether the layer is sparse at ``dense_len`` and beyond.
        status: The same in words, with the reason if it is not.
        config: Settings of a layer that is sparse at ``dense_len``; None for others.
        origin: Where the settings come from, in words.
    """

    name: str
    patched_through: str
    sparse: bool
    status: str
    config: InfLLMConfig | None = None
    origin: str = ""


class LayerTable(tuple[LayerRow, ...]):
    """A sequence of `LayerRow` that prints as an aligned table."""

    __slots__ = ()

    def __str__(self) -> str:
        head = ("layer", "patched through", "attention")
        lines = [head, *((row.name, row.patched_through or "-", row.status) for row in self)]
        widths = [max(len(line[column]) for line in lines) for column in range(2)]
        table = [
            f"{name:<{widths[0]}}  {through:<{widths[1]}}  {status}"
            for name, through, status in lines
        ]
        origins = dict.fromkeys(row.origin for row in self if row.origin)
        return "\n".join([*table, *(f"settings: {origin}" for origin in origins)])

    __repr__ = __str__


def describe(model: nn.Module) -> LayerTable:
    """List the attention layers of a model: how each was patched, whether it is sparse or why not.

    Args:
        model: Any model, patched or not. Layers that no adapter recognises are not listed.

    Returns:
        One row per attention layer, in the order of ``named_modules``.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    require_module(model)
    patched = discovery.patched_layers(model)
    found = discovery.find_layers(model)
    rows = {}
    for name, module in model.named_modules():
        if name in found or name in patched or own_layer(module) is not None:
            rows[name] = _row(name, patched.get(name), _find_skip_reason(module, found.get(name)))
    return LayerTable(rows.values())


def describe_switch(config: InfLLMConfig) -> str:
    """Say from where on attention is sparse."""
    by_position = ", query by query" if config.dense_by == "position" else ""
    return f"{config.longest_dense + 1} tokens on{by_position}"


def _find_skip_reason(module: nn.Module, found: AttentionModule | None) -> str | None:
    # The decision made when patching precedes what the layer's code says now.
    layer = own_layer(module)
    if layer is not None:
        return layer.skip_reason
    return None if found is None else found.skip_reason


def _row(name: str, layer: PatchedLayer | None, skip_reason: str | None) -> LayerRow:
    adapter = "" if layer is None else layer.adapter
    if skip_reason is not None:
        return LayerRow(name, adapter, False, f"{skip_reason}: left as it was")
    if layer is None:
        return LayerRow(name, "", False, "dense: not patched")
    if layer.is_in_dense_context():
        return LayerRow(name, adapter, False, "dense: inside infllm_flex.dense()")
    config = layer.config
    budget = f"{config.num_selected} blocks of {config.block_size}"
    status = f"sparse from {describe_switch(config)}: {budget}"
    return LayerRow(name, adapter, True, status, config, layer.origin)
