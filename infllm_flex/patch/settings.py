"""Make one InfLLMConfig of the settings that `patch_model` accepts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.head_groups import Heads
from infllm_flex_ops.device import FLOAT8_CAPABILITY, device_capability

Settings = InfLLMConfig | Mapping[str, Any] | str | os.PathLike[str] | None

GIVEN = "given to patch_model"
OWN = "the model's sparse_config"
RULE = "for models without a sparse_config: every key scored, docs/choosing-settings.md"
RULE_PART = (
    "for models without a sparse_config: every key scored in a part of the head dims, "
    "docs/choosing-settings.md"
)
RULE_WIDE = (
    "for models without a sparse_config, head dim above 128: means of 8 keys scored, "
    "docs/choosing-settings.md"
)

_MOST_POOLED = 128  # head dim up to which the mean query of a group finds what its heads look for
_PART = 32  # head dims that find as much as all do
# Tokens from which sparse attention is measured to be faster than dense on a GPU: the second with
# one query head to a key/value head. Above a head dim of 128 it is slower up to 131072.
_PAYS, _PAYS_ALONE, _PAYS_WIDE = 32768, 131072, 262144

# Settings that say what is scored. A user who changes one of them does not want the rule's scoring.
SCORING = ("kernel_size", "kernel_stride", "lse", "use_nope", "pool_queries")


class Resolved(NamedTuple):
    """Settings, and where they come from."""

    config: InfLLMConfig
    origin: str


def resolve_config(
    settings: Settings,
    overrides: Mapping[str, Any],
    model_configs: list[object],
    device: torch.device | None,
    heads: Heads,
    suits_score_dims: Callable[[int], bool],
) -> Resolved:
    """Read settings in any of their forms, then apply overrides by name.

    Args:
        settings: A config, a mapping, the path of a YAML file, or None for the model's own.
        overrides: Single settings that take precedence.
        model_configs: Configs whose ``sparse_config`` is used when ``settings`` is None, in order.
        device: Device of the model.
        heads: Heads of its attention layers.
        suits_score_dims: Asks whether they suit so many ``score_dims``.

    Raises:
        TypeError: ``settings`` is none of these.
        ValueError: An unknown name (the error shows the nearest known one) or an invalid value.
        NotImplementedError: ``use_nope``.
    """
    resolved = override(_read(settings, model_configs, device, heads, suits_score_dims), overrides)
    if resolved.config.use_nope:
        raise NotImplementedError(
            "use_nope=True scores blocks by queries and keys from before the rotary embedding, "
            "which models do not hand to their attention function; set use_nope=False"
        )
    return resolved


def override(resolved: Resolved, overrides: Mapping[str, Any]) -> Resolved:
    """Apply single settings by name.

    Whoever changes what is scored does not want the rule's scoring: then all settings that are not
    named are the defaults of InfLLMConfig, but ``dense_len``, which does not depend on it.
    ``score_dtype`` and ``score_dims`` change the rule's scoring, and values that are the rule's
    change nothing.

    Args:
        resolved: The settings.
        overrides: Single settings that take precedence.

    Raises:
        ValueError: An unknown name or an invalid value.
    """
    if not overrides:
        return resolved
    config, origin = resolved
    by_rule = origin in (RULE, RULE_PART, RULE_WIDE)
    if by_rule and any(x in overrides and overrides[x] != getattr(config, x) for x in SCORING):
        config, origin = InfLLMConfig(dense_len=config.dense_len), GIVEN
    config = InfLLMConfig.from_dict({**dataclasses.asdict(config), **overrides})
    if origin in (RULE, RULE_PART):
        origin = RULE_PART if config.score_dims else RULE
    return Resolved(config, origin)


def settings_by_rule(
    has_float8: bool, heads: Heads, suits_score_dims: Callable[[int], bool]
) -> Resolved:
    """Settings for a model that was trained with dense attention and has no settings of its own.

    Means of 32 keys hide single keys, which such models look for. Up to a head dim of 128 the mean
    query of a group against every key finds them, also in the 32 dims of the lowest rotary
    frequencies alone. With 256 it misses a third of them in the one model that was measured, and
    each head against means of 8 keys finds them. Sequences are dense where dense attention is
    faster.

    Args:
        has_float8: Whether the device multiplies float8, which is for speed.
        heads: Heads of the attention layers.
        suits_score_dims: Asks whether the layers suit so many ``score_dims``.
    """
    length = pays_from(heads)
    if _is_wide(heads):
        wide = InfLLMConfig(kernel_size=8, kernel_stride=4, dense_len=length)
        return Resolved(wide, RULE_WIDE)
    dtype = "float8" if has_float8 else "same"
    pooled = InfLLMConfig(
        kernel_size=1, kernel_stride=1, pool_queries=True, score_dtype=dtype, dense_len=length
    )
    if suits_score_dims(_PART):
        return Resolved(dataclasses.replace(pooled, score_dims=_PART), RULE_PART)
    return Resolved(pooled, RULE)


def pays_from(heads: Heads) -> int:
    """Tokens from which sparse attention is measured to be faster than dense on a GPU."""
    if _is_wide(heads):
        return _PAYS_WIDE
    return _PAYS_ALONE if heads.per_group == 1 else _PAYS


def _is_wide(heads: Heads) -> bool:
    return heads.head_dim is not None and heads.head_dim > _MOST_POOLED


def read_own(
    model_config: object,
    device: torch.device | None,
    heads: Heads,
    suits_score_dims: Callable[[int], bool],
) -> Resolved:
    """The settings in a model config's ``sparse_config``, else those of the rule.

    Args:
        model_config: The config.
        device: Device of the model; None where it has no parameters.
        heads: Heads of its attention layers.
        suits_score_dims: Asks whether they suit so many ``score_dims``.

    Raises:
        ValueError: ``sparse_config`` is no valid mapping of settings.
    """
    if getattr(model_config, "sparse_config", None) is not None:
        return Resolved(InfLLMConfig.from_model_config(model_config), OWN)
    has_float8 = device is not None and device_capability(device) >= FLOAT8_CAPABILITY
    return settings_by_rule(has_float8, heads, suits_score_dims)


def _read(
    settings: Settings,
    model_configs: list[object],
    device: torch.device | None,
    heads: Heads,
    suits_score_dims: Callable[[int], bool],
) -> Resolved:
    if isinstance(settings, InfLLMConfig):
        return Resolved(settings, GIVEN)
    if isinstance(settings, Mapping):
        return Resolved(InfLLMConfig.from_dict(settings), GIVEN)
    if isinstance(settings, str | os.PathLike):
        return Resolved(InfLLMConfig.from_yaml(os.fspath(settings)), GIVEN)
    if settings is not None:
        raise TypeError(
            "config must be an InfLLMConfig, a mapping, a path to a YAML file or None, "
            f"got {type(settings).__name__}"
        )
    for model_config in model_configs:
        if getattr(model_config, "sparse_config", None) is not None:
            return read_own(model_config, device, heads, suits_score_dims)
    return read_own(None, device, heads, suits_score_dims)
