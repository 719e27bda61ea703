"""What became of each attention layer, as rows and as a table."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import discovery as ladder
from infllm_flex.patch.discovery import Found
from infllm_flex.patch.layer_state import PatchedLayer, get_layer
from infllm_flex.patch.unsupported import require_module


class LayerRow(NamedTuple):
    """One attention layer.

    Attributes:
        name: Of the module, as in ``named_modules``.
        patched_through: The way into the layer, ``"transformers"`` or another; empty if the layer
            does not go through this package.
        sparse: Whether the layer is sparse at ``dense_len`` and beyond.
        status: The same in words, and why not.
        config: The settings of a layer that is sparse at ``dense_len``; None of others.
        origin: Where they come from, in words.
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
    """Say of each attention layer how it was patched, and whether it is sparse or why not.

    Args:
        model: Any model, patched or not; layers that cannot be told as such are not listed.

    Returns:
        One row per attention layer, in the order of ``named_modules``.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    require_module(model)
    patched = ladder.patched_layers(model)
    found = ladder.find_layers(model)
    rows = {}
    for name, module in model.named_modules():
        if name in found or name in patched or get_layer(module) is not None:
            rows[name] = _row(name, patched.get(name), _why_left(module, found.get(name)))
    return LayerTable(rows.values())


def _why_left(module: nn.Module, found: Found | None) -> str | None:
    # What patching decided goes before what the code of the layer says by itself.
    layer = get_layer(module)
    if layer is not None:
        return layer.left
    return None if found is None else found.left


def _row(name: str, layer: PatchedLayer | None, left: str | None) -> LayerRow:
    way = "" if layer is None else layer.way
    if left is not None:
        return LayerRow(name, way, False, f"{left}: left as it was")
    if layer is None:
        return LayerRow(name, "", False, "dense: not patched")
    if layer.is_inside_block():
        return LayerRow(name, way, False, "dense: inside infllm_flex.dense()")
    config = layer.config
    status = (
        f"sparse from {max(config.dense_len, 1)} tokens on: "
        f"{config.num_selected} blocks of {config.block_size}"
    )
    return LayerRow(name, way, True, status, config, layer.origin)
