"""Find the attention layers of a model. Three adapters are asked in order; the first match serves.

1. transformers' attention registry (`infllm_flex.patch.huggingface`)
2. known libraries that attend in one place (`infllm_flex.patch.library_adapters`)
3. any call of ``F.scaled_dot_product_attention`` (`infllm_flex.patch.sdpa_adapter`)

The third also serves modules that the user names or that attended under the user's example,
whatever their code says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import code_inspection, huggingface, sdpa_adapter
from infllm_flex.patch.class_swap import Overrides, restore_class, swap_class, swapped_adapter
from infllm_flex.patch.forward_hooks import install_forward_hooks, remove_forward_hooks
from infllm_flex.patch.head_dims import head_dim_skip_reason
from infllm_flex.patch.head_groups import count_heads
from infllm_flex.patch.huggingface import causality
from infllm_flex.patch.layer_state import (
    NOT_PATCHED,
    PatchedLayer,
    get_layer,
    own_layer,
    remove_layer,
    set_layer,
)
from infllm_flex.patch.library_adapters import find_library_adapter
from infllm_flex.patch.skip_reasons import OTHER_ATTENTION, TOWER

TRANSFORMERS = "transformers"


class AttentionModule(NamedTuple):
    """An attention layer and the adapter that serves it.

    Attributes:
        module: The layer.
        adapter: Name of the adapter, as `describe` shows it.
        skip_reason: Why the layer cannot be sparse; None if it can.
        overrides: The members that its swapped class overrides; None for transformers, which needs
            no swapped class.
    """

    module: nn.Module
    adapter: str
    skip_reason: str | None
    overrides: Overrides | None = None


def find_layers(
    model: nn.Module,
    named: Collection[nn.Module] | None = None,
    seen: Mapping[nn.Module, str | None] | None = None,
) -> dict[str, AttentionModule]:
    """Find all attention layers that some adapter serves, by name, in ``named_modules`` order.

    Args:
        model: The model.
        named: Modules that the user names as attention layers; no others are looked for.
        seen: Modules that attended under the user's example, each with its skip reason or None.
            They replace what the code of the modules says.
    """
    by_registry = huggingface.attention_layers(model)
    windows = huggingface.inherited_windows(model)
    found: dict[str, AttentionModule] = {}
    for name, module in model.named_modules():
        if named is not None and module not in named and name not in by_registry:
            continue
        if name in by_registry:
            reason = huggingface.find_skip_reason(module)
            if named is not None and module not in named:
                reason = "not among attention_modules"
            elif reason is None and module in windows:
                reason = f"sliding window {windows[module]}"
            found[name] = AttentionModule(module, TRANSFORMERS, reason)
        elif (library := find_library_adapter(name, module)) is not None:
            reason = library.find_skip_reason(module) or head_dim_skip_reason(module)
            found[name] = AttentionModule(module, library.name, reason, library.overrides)
        elif named is not None or _attends(module, seen):
            reason = _sdpa_skip_reason(module, named, seen) or head_dim_skip_reason(module)
            found[name] = AttentionModule(module, sdpa_adapter.NAME, reason, sdpa_adapter.overrides)
    if named is not None:
        return found
    found = _innermost(found)
    for name in _towers(model, found, seen):
        found[name] = found[name]._replace(skip_reason=TOWER)
    return found


def sparse_modules(layers: Mapping[str, AttentionModule]) -> dict[str, nn.Module]:
    """The layers among those found that can be sparse, by name."""
    return {name: found.module for name, found in layers.items() if found.skip_reason is None}


def _towers(
    model: nn.Module,
    found: Mapping[str, AttentionModule],
    seen: Mapping[nn.Module, str | None] | None,
) -> list[str]:
    """Layers that no cache reaches, in a model whose language model has one.

    Code that passes ``is_causal`` to SDPA is trusted, and so is an example of the user.
    """
    without = causality.find_without_cache(model, found)
    others = (layer.skip_reason for name, layer in found.items() if name not in without)
    if all(reason in OTHER_ATTENTION for reason in others):
        return []
    return [
        name
        for name, layer in found.items()
        if name in without and layer.skip_reason is None and _may_be_tower(layer, seen is not None)
    ]


def _may_be_tower(layer: AttentionModule, was_seen: bool) -> bool:
    if layer.adapter == sdpa_adapter.NAME:
        return not was_seen and code_inspection.causal_by_mask_alone(layer.module)
    return layer.adapter == TRANSFORMERS


def _attends(module: nn.Module, seen: Mapping[nn.Module, str | None] | None) -> bool:
    if seen is not None:
        return module in seen
    return swapped_adapter(module) == sdpa_adapter.NAME or sdpa_adapter.recognises(module)


def _sdpa_skip_reason(
    module: nn.Module,
    named: Collection[nn.Module] | None,
    seen: Mapping[nn.Module, str | None] | None,
) -> str | None:
    if seen is not None and module in seen:
        return seen[module] or sdpa_adapter.swap_skip_reason(module)
    if named is not None or swapped_adapter(module) == sdpa_adapter.NAME:
        return sdpa_adapter.swap_skip_reason(module)
    return sdpa_adapter.find_skip_reason(module)


def _innermost(found: dict[str, AttentionModule]) -> dict[str, AttentionModule]:
    """Drop modules that attend only through a module inside them."""
    outer = {name[:end] for name in found for end in _ends_of_parents(name)}
    return {name: layer for name, layer in found.items() if name not in outer}


def _ends_of_parents(name: str) -> list[int]:
    dots = [at for at, letter in enumerate(name) if letter == "."]
    return [0, *dots] if name else []


def attach(
    model: nn.Module,
    layers: Mapping[str, AttentionModule],
    config: InfLLMConfig,
    kv_heads: int | None,
) -> None:
    """Make the supported layers sparse, and record at the others why they stay dense.

    Args:
        model: The model around the layers.
        layers: The result of `find_layers`; at least one layer has no skip reason.
        config: Settings for all layers.
        kv_heads: Key/value heads, where the user gives them.
    """
    modules = {found.module for found in layers.values()}
    for module in model.modules():
        # An earlier call may have patched layers that this one does not.
        if swapped_adapter(module) is not None and module not in modules:
            restore_class(module)
            remove_layer(module)
    by_registry = {f.module: f.skip_reason for f in layers.values() if f.overrides is None}
    huggingface.attach(model, by_registry, config)
    for found in layers.values():
        if found.overrides is None:
            continue
        query_heads, own_kv_heads = count_heads(found.module, model, kv_heads)
        layer = PatchedLayer(
            config,
            skip_reason=found.skip_reason,
            adapter=found.adapter,
            query_heads=query_heads,
            kv_heads=own_kv_heads,
        )
        set_layer(found.module, layer)
        if found.skip_reason is None:
            swap_class(found.module, found.adapter, found.overrides)
        else:
            restore_class(found.module)
    install_forward_hooks(model)


def patched_layers(model: nn.Module) -> dict[str, PatchedLayer]:
    """The records of all patched layers, by module name."""
    through_registry = huggingface.patched_layers(model)
    layers: dict[str, PatchedLayer] = {}
    for name, module in model.named_modules():
        if name in through_registry:
            layers[name] = through_registry[name]
        elif swapped_adapter(module) is not None and (layer := get_layer(module)) is not None:
            layers[name] = layer
    return layers


def detach(model: nn.Module) -> bool:
    """Undo all patching.

    Returns:
        Whether there was anything to undo.

    Raises:
        ValueError: Another class replaced that of a patched layer; nothing was undone.
    """
    swapped = [module for module in model.modules() if swapped_adapter(module) is not None]
    undone = [restore_class(module) for module in sorted(swapped, key=_is_covered, reverse=True)]
    undone.append(huggingface.detach(model))
    remove_forward_hooks(model)
    for module in model.modules():
        layer = own_layer(module)
        if layer is not None and layer.skip_reason != NOT_PATCHED:
            remove_layer(module)
    return any(undone)


def _is_covered(module: nn.Module) -> bool:
    """Whether another class lies over the swapped one, so that it cannot be restored."""
    return "_infllm_adapter" not in vars(type(module))
