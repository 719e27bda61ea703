"""Configs of models whose layers differ, such as Gemma 4's.

transformers refuses to read an attribute that differs from such a config; each layer has its own.
"""

from __future__ import annotations

from typing import Any

_FULL = "full_attention"


def config_of_layer(config: Any, index: int | None) -> Any:
    """Config whose attributes hold for a layer; None where layers differ and it is not known which.

    Args:
        config: The model's, of any library.
        index: The layer's number, or None.
    """
    if not getattr(config, "is_heterogeneous", False):
        return config
    return None if index is None else config.per_layer_config[index]


def config_of_full_layer(config: Any) -> Any:
    """Config of the first layer with full attention, or of the first if the config names none."""
    kinds = list(getattr(config, "layer_types", None) or ())
    return config_of_layer(config, kinds.index(_FULL) if _FULL in kinds else 0)
