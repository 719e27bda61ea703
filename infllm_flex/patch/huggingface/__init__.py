"""The way into transformers models: one attention function, registered under one name.

The registry is global to the process, so it holds only the function. The settings of a layer are an
attribute of its module (`infllm_flex.patch.layer_state`). The name under which it finds the
function is in a config of its own (`infllm_flex.patch.huggingface.config_view`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.huggingface.cache import deliver_cache_to, stop_delivering_cache_to
from infllm_flex.patch.huggingface.config_view import PREVIOUS, is_view
from infllm_flex.patch.huggingface.instance_forward import stop_expecting_calls
from infllm_flex.patch.huggingface.layers import (
    attention_layers,
    implementation,
    layer_for,
    layer_of,
    why_left,
    windows_from_above,
)
from infllm_flex.patch.huggingface.registry import register, register_when_imported
from infllm_flex.patch.huggingface.switch import switch_off, switch_on
from infllm_flex.patch.layer_state import (
    NOT_PATCHED,
    PatchedLayer,
    get_layer,
    remove_layer,
    set_layer,
)

__all__ = [
    "attach",
    "attention_layers",
    "detach",
    "patched_layers",
    "register_when_imported",
    "why_left",
    "windows_from_above",
]


def attach(model: nn.Module, layers: Mapping[nn.Module, str | None], config: InfLLMConfig) -> None:
    """Make the layers that can be sparse so, and note at the others why they are left.

    Args:
        model: The model around them.
        layers: Its layers, each with why it is left, or None.
        config: Settings for all of them.
    """
    sparse = [module for module, left in layers.items() if left is None]
    if not sparse:
        return
    register()
    switch_on(model, sparse)
    for module, left in layers.items():
        layer = layer_for(module, config, left, reads_positions=module is sparse[0])
        set_layer(module, layer)
    for module in sparse:
        deliver_cache_to(module)


def patched_layers(model: nn.Module) -> dict[str, PatchedLayer]:
    """The records of all layers that go through our attention function, by module name."""
    layers = {
        name: layer_of(module)
        for name, module in attention_layers(model).items()
        if implementation(module) in PREVIOUS and not _is_bystander(module)
    }
    return {name: layer for name, layer in layers.items() if layer.left != NOT_PATCHED}


def _is_bystander(module: nn.Module) -> bool:
    """Whether a layer holds the config view of a patched model without being patched itself."""
    return is_view(module.config) and get_layer(module) is None


def detach(model: nn.Module) -> bool:
    """Undo `attach`, or ``attn_implementation="infllm_flex"``.

    Returns:
        Whether there was anything to undo.
    """
    undone, staying = switch_off(model)
    for module in attention_layers(model).values():
        undone = undone or get_layer(module) is not None
        stop_delivering_cache_to(module)
        stop_expecting_calls(module)
        if module not in staying:
            remove_layer(module)
    for module in staying:
        layer_of(module).left = NOT_PATCHED
    return undone
