"""Single attention settings on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infllm_flex.config import InfLLMConfig


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read ``attention.key=value`` as settings of the model's own attention.

    Raises:
        ValueError: An argument has another form, or a setting is unknown or impossible.
    """
    import yaml

    values: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        section, _, key = name.partition(".")
        if section != "attention" or not key or not equals:
            raise ValueError(f"settings must be written attention.key=value, got {argument}")
        values[key] = yaml.safe_load(value)
    InfLLMConfig.from_dict(values)
    return values
