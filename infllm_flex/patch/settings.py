"""From what `patch_model` is given to one InfLLMConfig."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from infllm_flex.config import InfLLMConfig

Settings = InfLLMConfig | Mapping[str, Any] | str | os.PathLike[str] | None


def resolve_config(
    settings: Settings, overrides: Mapping[str, Any], model_configs: list[object]
) -> InfLLMConfig:
    """Read settings in any of their forms, then apply overrides by name.

    Args:
        settings: A config, a mapping, the path of a YAML file, or None for what the model itself
            asks for.
        overrides: Single settings that go on top.
        model_configs: Where to look for ``sparse_config`` when ``settings`` is None, in order.

    Raises:
        TypeError: ``settings`` is none of these.
        ValueError: An unknown name, with the nearest known one, or an impossible value.
        NotImplementedError: ``use_nope``.
    """
    config = _read(settings, model_configs)
    if overrides:
        config = InfLLMConfig.from_dict({**dataclasses.asdict(config), **overrides})
    if config.use_nope:
        raise NotImplementedError(
            "use_nope=True scores blocks by queries and keys from before the rotary embedding, "
            "which models do not hand to their attention function; set use_nope=False"
        )
    return config


def _read(settings: Settings, model_configs: list[object]) -> InfLLMConfig:
    if isinstance(settings, InfLLMConfig):
        return settings
    if isinstance(settings, Mapping):
        return InfLLMConfig.from_dict(settings)
    if isinstance(settings, str | os.PathLike):
        return InfLLMConfig.from_yaml(os.fspath(settings))
    if settings is not None:
        raise TypeError(
            "config must be an InfLLMConfig, a mapping, a path to a YAML file or None, "
            f"got {type(settings).__name__}"
        )
    for model_config in model_configs:
        if getattr(model_config, "sparse_config", None) is not None:
            return InfLLMConfig.from_model_config(model_config)
    return InfLLMConfig()
