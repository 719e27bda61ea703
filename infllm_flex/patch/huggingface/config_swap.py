"""Give the modules of one model views of their configs, and give the configs back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from infllm_flex.patch.errors import UnsupportedModelError
from infllm_flex.patch.huggingface.attention_layers import (
    attention_layers,
    implementation,
    makes_masks,
    previous_implementation,
)
from infllm_flex.patch.huggingface.config_view import (
    PATCHED_NAMES,
    PREVIOUS_NAMES,
    is_used_for_masks,
    is_view,
    mark_used_for_masks,
    original_config,
    rename_view,
    view_of,
    with_parts,
)
from infllm_flex.patch.huggingface.transformers_private import (
    get_implementation,
    has_implementation,
    set_own_implementation,
    sub_configs,
)


def install_views(model: nn.Module, sparse: list[nn.Module]) -> None:
    """Make attention layers look up our function, and modules that make masks ours.

    A layer that stays dense gets our masks, too, if it shares a config with one of ``sparse``.

    Args:
        model: The model.
        sparse: Its attention layers that can be sparse.

    Raises:
        UnsupportedModelError: No view of a config can be made.
    """
    views = _views_within(model)
    ours: dict[int, Any] = {}
    for module in sparse:
        original = original_config(module.config)
        if id(original) in ours or get_implementation(original) in PREVIOUS_NAMES:
            continue  # the config itself asks for us by name
        name = PATCHED_NAMES[previous_implementation(module)]
        view = views.get(id(original)) or _make_view(original, name)
        rename_view(view, name)
        ours[id(original)] = view
    attends = set(attention_layers(model).values())
    for module in model.modules():
        config = vars(module).get("config")
        if config is not None and (module in attends or makes_masks(module)):
            view = _view_for(original_config(config), ours)
            if view is not None:
                module.config = view
                if makes_masks(module):
                    for part in with_parts(view):
                        mark_used_for_masks(part)


def _views_within(model: nn.Module) -> dict[int, Any]:
    """The views that a model already has, by the identity of their originals."""
    configs = [vars(module).get("config") for module in model.modules()]
    return {id(original_config(config)): config for config in configs if is_view(config)}


def _make_view(original: Any, name: str) -> Any:
    from transformers.configuration_utils import PreTrainedConfig

    if not isinstance(original, PreTrainedConfig):
        raise UnsupportedModelError(
            f"the attention layers' config is a {type(original).__name__}, no PreTrainedConfig of "
            "transformers, so the attention function cannot be chosen by it: build the model with "
            "a config of transformers"
        )
    return view_of(original, name)


def _view_for(original: Any, views: Mapping[int, Any]) -> Any:
    """The view of a config, or a new view of one that holds it; None if it holds none."""
    if id(original) in views:
        return views[id(original)]
    parts = {key: _view_for(part, views) for key, part in sub_configs(original).items()}
    parts = {key: part for key, part in parts.items() if part is not None}
    return view_of(original, None, parts) if parts else None


def remove_views(model: nn.Module) -> tuple[bool, list[nn.Module]]:
    """Undo `install_views`, or ``attn_implementation="infllm_flex"``.

    A view stays where only a part of a model is undone and the masks are made outside of it,
    because the attention layers must go on taking these masks.

    Returns:
        Whether there was anything to undo, and the layers whose view stays.
    """
    holders = [module for module in model.modules() if is_view(vars(module).get("config"))]
    attends = set(attention_layers(model).values())
    masked = {part for module in holders if makes_masks(module) for part in module.modules()}
    undone, staying = bool(holders), []
    for module in holders:
        view: Any = module.config
        if module not in attends or module in masked or not is_used_for_masks(view):
            module.config = original_config(view)
        else:
            staying.append(module)
    if any(implementation(m) in PREVIOUS_NAMES for m in attends if not is_view(m.config)):
        _remove_our_name(model)
        undone = True
    return undone, staying


def _remove_our_name(model: nn.Module) -> None:
    """Give a model whose config names us a config of its own, as others may hold that one."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if has_implementation(config):
            own: Any = copy.deepcopy(config, memo)
            _name_previous(own)
            module.config = own


def _name_previous(config: Any) -> None:
    name = get_implementation(config)
    if name in PREVIOUS_NAMES:
        set_own_implementation(config, PREVIOUS_NAMES[name])
    for part in sub_configs(config).values():
        _name_previous(part)
