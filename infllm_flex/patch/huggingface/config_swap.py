"""Give the modules of one model their config views, and take them away again."""

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


def install_views(model: nn.Module, sparse: list[nn.Module]) -> None:
    """Have the attention layers of a model look up our function, and their masks be ours.

    A layer that stays as it was gets our masks, too, if it shares a config with one of ``sparse``.

    Args:
        model: The model.
        sparse: Its attention layers that can be sparse.

    Raises:
        UnsupportedModelError: A config that no view can be made of.
    """
    views = _views_within(model)
    ours: dict[int, Any] = {}
    for module in sparse:
        original = original_config(module.config)
        if id(original) in ours or original._attn_implementation in PREVIOUS_NAMES:
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
    """The views that a model has already, by the identity of their originals."""
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
    """The view of a config, or one of a config around it, made here; None if it holds none."""
    if id(original) in views:
        return views[id(original)]
    parts = {}
    for key in getattr(original, "sub_configs", None) or ():
        part = vars(original).get(key)
        inner = None if part is None else _view_for(part, views)
        if inner is not None:
            parts[key] = inner
    return view_of(original, None, parts) if parts else None


def remove_views(model: nn.Module) -> tuple[bool, list[nn.Module]]:
    """Undo `install_views`, or ``attn_implementation="infllm_flex"``.

    A view stays where only a part of a model is undone, and the masks are made outside of it: the
    attention layers must go on taking them.

    Returns:
        Whether there was anything to undo, and the layers whose view stays.
    """
    holders = [module for module in model.modules() if is_view(vars(module).get("config"))]
    attends = set(attention_layers(model).values())
    masked = {
        id(view)
        for module in holders
        if makes_masks(module)
        for view in with_parts(vars(module)["config"])
    }
    undone, staying = bool(holders), []
    for module in holders:
        view: Any = module.config
        if module not in attends or id(view) in masked or not is_used_for_masks(view):
            module.config = original_config(view)
        else:
            staying.append(module)
    if any(implementation(m) in PREVIOUS_NAMES for m in attends if not is_view(m.config)):
        _ask_no_more_by_name(model)
        undone = True
    return undone, staying


def _ask_no_more_by_name(model: nn.Module) -> None:
    """Give a model that its config made sparse a config of its own: others may hold that one."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if hasattr(config, "_attn_implementation"):
            own: Any = copy.deepcopy(config, memo)
            _name_previous(own)
            module.config = own


def _name_previous(config: Any) -> None:
    if config._attn_implementation in PREVIOUS_NAMES:
        # The internal name: the public setter would overwrite the sub-configs.
        config._attn_implementation_internal = PREVIOUS_NAMES[config._attn_implementation]
    for key in getattr(config, "sub_configs", None) or ():
        part = vars(config).get(key)
        if hasattr(part, "_attn_implementation"):
            _name_previous(part)
