"""The way into transformers models: one attention function, registered under one name.

The registry is global to the process, so it holds only the function; what the layers of one model
are set to is an attribute of their modules (`infllm_flex.patch.layer`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.errors import UnsupportedModelError
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


def attach(model: nn.Module, config: InfLLMConfig) -> None:
    """Make every layer that can be sparse so, and note at the others why they are left.

    Args:
        model: A transformers model, or any module that contains one.
        config: Settings for all its layers.

    Raises:
        UnsupportedModelError: No layer can be sparse; the model is as it was.
    """
    layers = attention_layers(model)
    left = {name: why_left(module) for name, module in layers.items()}
    sparse = [layers[name] for name, reason in left.items() if reason is None]
    if not sparse:
        raise UnsupportedModelError(_nothing_to_patch(model, left))
    register()
    for module in layers.values():
        set_layer(module, layer_for(module, config, reads_positions=module is sparse[0]))
    for module in sparse:
        _rename(module.config, NAMES[previous_implementation(module)])


def _rename(hf_config: Any, name: str) -> None:
    # The internal name: the public setter would overwrite the sub-configs of, say, a vision tower.
    hf_config._attn_implementation_internal = name
    if hf_config._attn_implementation != name:
        raise UnsupportedModelError(
            f"{type(hf_config).__name__} keeps attn_implementation="
            f"{hf_config._attn_implementation!r} whatever is set; it cannot be patched"
        )


def _nothing_to_patch(model: nn.Module, left: dict[str, str | None]) -> str:
    if left:
        counts: dict[str, int] = {}
        for reason in left.values():
            counts[str(reason)] = counts.get(str(reason), 0) + 1
        found = f"{len(left)} attention layers, none of which can be sparse: " + ", ".join(
            f"{count} x {reason}" for reason, count in counts.items()
        )
    else:
        found = "no layer that takes its attention function from transformers' registry"
    return (
        f"{type(model).__name__} cannot be patched: found {found}; tried the registry of "
        "transformers, the one way there is yet; for causal full attention written by hand, call "
        "infllm_flex.infllm_attention in the model's own forward"
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
        remove_layer(module)
    return undone
