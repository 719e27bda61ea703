"""The way into transformers models: one attention function, registered under one name.

The registry is global to the process, so it holds only the function; what the layers of one model
are set to is an attribute of their modules (`infllm_flex.patch.layer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.errors import UnsupportedModelError
from infllm_flex.patch.huggingface.cache import deliver_cache_to, stop_delivering_cache_to
from infllm_flex.patch.huggingface.layers import (
    NAMES,
    PREVIOUS,
    attention_layers,
    implementation,
    layer_for,
    layer_of,
    previous_implementation,
    why_left,
)
from infllm_flex.patch.huggingface.registry import register, register_when_imported
from infllm_flex.patch.layer import PatchedLayer, get_layer, remove_layer, set_layer

__all__ = [
    "attach",
    "attention_layers",
    "detach",
    "patched_layers",
    "register_when_imported",
    "why_left",
]


def attach(layers: Mapping[nn.Module, str | None], config: InfLLMConfig) -> None:
    """Make the layers that can be sparse so, and note at the others why they are left.

    Args:
        layers: The layers of one model, each with why it is left, or None.
        config: Settings for all of them.
    """
    sparse = [module for module, left in layers.items() if left is None]
    if not sparse:
        return
    register()
    for module, left in layers.items():
        layer = layer_for(module, config, left, reads_positions=module is sparse[0])
        set_layer(module, layer)
    for module in sparse:
        deliver_cache_to(module)
        _rename(module.config, NAMES[previous_implementation(module)])


def _rename(hf_config: Any, name: str) -> None:
    # The internal name: the public setter would overwrite the sub-configs of, say, a vision tower.
    hf_config._attn_implementation_internal = name
    if hf_config._attn_implementation != name:
        raise UnsupportedModelError(
            f"{type(hf_config).__name__} keeps attn_implementation="
            f"{hf_config._attn_implementation!r} whatever is set; it cannot be patched"
        )


def patched_layers(model: nn.Module) -> dict[str, PatchedLayer]:
    """The records of all layers that go through our attention function, by module name."""
    return {
        name: layer_of(module)
        for name, module in attention_layers(model).items()
        if implementation(module) in PREVIOUS
    }


def detach(model: nn.Module) -> bool:
    """Undo `attach`, or ``attn_implementation="infllm_flex"``.

    Returns:
        Whether there was anything to undo.
    """
    undone = False
    for module in attention_layers(model).values():
        if implementation(module) in PREVIOUS:
            _rename(module.config, previous_implementation(module))
            undone = True
        undone = undone or get_layer(module) is not None
        stop_delivering_cache_to(module)
        remove_layer(module)
    return undone
