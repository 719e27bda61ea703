"""The ways into a model, in order: the first that recognises a module takes it.

1. transformers' attention registry (`infllm_flex.patch.huggingface`)
2. the one place where a known project's layers attend (`infllm_flex.patch.library_adapters`)
3. any call of ``F.scaled_dot_product_attention`` (`infllm_flex.patch.sdpa_adapter`)

A module that the user names, or that was seen attending, enters at the third, whatever its code
says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import huggingface
from infllm_flex.patch import library_adapters as seams
from infllm_flex.patch import sdpa_adapter as generic
from infllm_flex.patch.class_swap import Members, restore_class, swap_class, swapped_way
from infllm_flex.patch.forward import note_forwards_of, stop_noting_forwards_of
from infllm_flex.patch.head_dims import why_heads_left
from infllm_flex.patch.heads import count_heads
from infllm_flex.patch.layer_state import (
    NOT_PATCHED,
    PatchedLayer,
    get_layer,
    remove_layer,
    set_layer,
)

TRANSFORMERS = "transformers"


class Found(NamedTuple):
    """An attention layer and the way to it.

    Attributes:
        module: The layer.
        way: Its name, as `describe` shows it.
        left: Why it stays as it is; None if it can be sparse.
        members: What its swapped class overrides; None for transformers, which need none.
    """

    module: nn.Module
    way: str
    left: str | None
    members: Members | None = None


def find_layers(
    model: nn.Module,
    named: Collection[nn.Module] | None = None,
    seen: Mapping[nn.Module, str | None] | None = None,
) -> dict[str, Found]:
    """All attention layers that any way leads to, by name, in the order of ``named_modules``.

    Args:
        model: The model.
        named: Modules the user says attend; no others are looked for.
        seen: Modules that attended under the user's example, and why each cannot be sparse; takes
            the place of what their code says.
    """
    by_registry = huggingface.attention_layers(model)
    windows = huggingface.windows_from_above(model)
    found: dict[str, Found] = {}
    for name, module in model.named_modules():
        if named is not None and module not in named and name not in by_registry:
            continue
        if name in by_registry:
            left = huggingface.why_left(module)
            if named is not None and module not in named:
                left = "not among attention_modules"
            elif left is None and module in windows:
                left = f"sliding window {windows[module]}"
            found[name] = Found(module, TRANSFORMERS, left)
        elif (seam := seams.find_seam(name, module)) is not None:
            left = seam.why_left(module) or why_heads_left(module)
            found[name] = Found(module, seam.name, left, seam.members)
        elif named is not None or _attends(module, seen):
            left = _why_left(module, named, seen) or why_heads_left(module)
            found[name] = Found(module, generic.NAME, left, generic.members)
    return found if named is not None else _innermost(found)


def _attends(module: nn.Module, seen: Mapping[nn.Module, str | None] | None) -> bool:
    if seen is not None:
        return module in seen
    return swapped_way(module) == generic.NAME or generic.recognises(module)


def _why_left(
    module: nn.Module,
    named: Collection[nn.Module] | None,
    seen: Mapping[nn.Module, str | None] | None,
) -> str | None:
    if seen is not None and module in seen:
        return seen[module] or generic.why_not_swapped(module)
    if named is not None or swapped_way(module) == generic.NAME:
        return generic.why_not_swapped(module)
    return generic.why_left(module)


def _innermost(found: dict[str, Found]) -> dict[str, Found]:
    """Leave out what reaches attention by way of a module inside it."""
    outer = {name[:end] for name in found for end in _ends_of_parents(name)}
    return {name: layer for name, layer in found.items() if name not in outer}


def _ends_of_parents(name: str) -> list[int]:
    dots = [at for at, letter in enumerate(name) if letter == "."]
    return [0, *dots] if name else []


def attach(
    model: nn.Module, layers: Mapping[str, Found], config: InfLLMConfig, kv_heads: int | None
) -> None:
    """Make the layers that can be sparse so, and note at the others why they are left.

    Args:
        model: The model around them.
        layers: What `find_layers` found, one of them at least without a reason to be left.
        config: Settings for all of them.
        kv_heads: Key/value heads, where the user says.
    """
    for module in model.modules():  # what an earlier call had patched and this one does not
        if swapped_way(module) is not None and not any(module is f.module for f in layers.values()):
            restore_class(module)
            remove_layer(module)
    by_registry = {name: f for name, f in layers.items() if f.members is None}
    huggingface.attach(model, {f.module: f.left for f in by_registry.values()}, config)
    for found in layers.values():
        if found.members is None:
            continue
        query_heads, own_kv_heads = count_heads(found.module, model, kv_heads)
        record = PatchedLayer(
            config, left=found.left, way=found.way, query_heads=query_heads, kv_heads=own_kv_heads
        )
        set_layer(found.module, record)
        if found.left is None:
            swap_class(found.module, found.way, found.members)
        else:
            restore_class(found.module)
    note_forwards_of(model)


def patched_layers(model: nn.Module) -> dict[str, PatchedLayer]:
    """The records of all layers that go through this package, by module name."""
    through_registry = huggingface.patched_layers(model)
    layers: dict[str, PatchedLayer] = {}
    for name, module in model.named_modules():
        if name in through_registry:
            layers[name] = through_registry[name]
        elif swapped_way(module) is not None and (layer := get_layer(module)) is not None:
            layers[name] = layer
    return layers


def detach(model: nn.Module) -> bool:
    """Undo all patching.

    Returns:
        Whether there was anything to undo.

    Raises:
        ValueError: A patched layer has been given yet another class; nothing was undone.
    """
    swapped = [module for module in model.modules() if swapped_way(module) is not None]
    undone = [restore_class(module) for module in sorted(swapped, key=_is_covered, reverse=True)]
    undone.append(huggingface.detach(model))
    stop_noting_forwards_of(model)
    for module in model.modules():
        layer = get_layer(module)
        if layer is not None and layer.left != NOT_PATCHED:
            remove_layer(module)
    return any(undone)


def _is_covered(module: nn.Module) -> bool:
    """Whether another class lies over the swapped one, which refuses to be restored."""
    return "_infllm_way" not in vars(type(module))
