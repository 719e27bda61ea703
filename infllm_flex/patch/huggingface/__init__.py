"""The adapter for transformers models: one attention function in transformers' registry.

The registry is global to the process, so it holds only the function. The settings of a layer are an
attribute of its module (`infllm_flex.patch.layer_state`). The name under which the layer finds the
function stands in a view of its config (`infllm_flex.patch.huggingface.config_view`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.huggingface.attention_layers import (
    attention_layers,
    find_skip_reason,
    implementation,
    inherited_windows,
    make_layer,
)
from infllm_flex.patch.huggingface.cache_hook import install_cache_hook, remove_cache_hook
from infllm_flex.patch.huggingface.config_swap import install_views, remove_views
from infllm_flex.patch.huggingface.config_view import PREVIOUS_NAMES, is_view
from infllm_flex.patch.huggingface.instance_forward import remove_call_hook
from infllm_flex.patch.huggingface.layer_records import get_or_make_layer
from infllm_flex.patch.huggingface.registry import register, register_when_imported
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
    "find_skip_reason",
    "inherited_windows",
    "patched_layers",
    "register_when_imported",
]


def attach(model: nn.Module, layers: Mapping[nn.Module, str | None], config: InfLLMConfig) -> None:
    """Make the supported layers sparse, and record at the others why they stay dense.

    Args:
        model: The model around the layers.
        layers: Its attention layers, each with its skip reason or None.
        config: Settings for all layers.
    """
    sparse = [module for module, reason in layers.items() if reason is None]
    if not sparse:
        return
    register()
    install_views(model, sparse)
    for module, reason in layers.items():
        set_layer(module, make_layer(module, config, reason))
    for module in sparse:
        install_cache_hook(module)


def patched_layers(model: nn.Module) -> dict[str, PatchedLayer]:
    """The records of all layers that go through our attention function, by module name."""
    layers = {
        name: get_or_make_layer(module)
        for name, module in attention_layers(model).items()
        if implementation(module) in PREVIOUS_NAMES and not _is_bystander(module)
    }
    return {name: layer for name, layer in layers.items() if layer.skip_reason != NOT_PATCHED}


def _is_bystander(module: nn.Module) -> bool:
    """Whether a layer holds the config view of a patched model without being patched itself."""
    return is_view(module.config) and get_layer(module) is None


def detach(model: nn.Module) -> bool:
    """Undo `attach`, or ``attn_implementation="infllm_flex"``.

    Returns:
        Whether there was anything to undo.
    """
    undone, staying = remove_views(model)
    for module in attention_layers(model).values():
        undone = undone or get_layer(module) is not None
        remove_cache_hook(module)
        remove_call_hook(module)
        if module not in staying:
            remove_layer(module)
    for module in staying:
        get_or_make_layer(module).skip_reason = NOT_PATCHED
    return undone
