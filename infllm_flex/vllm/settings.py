"""Which models are served sparsely: those that have settings, in their folder or from the user."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.head_groups import read_heads_of_config
from infllm_flex.patch.settings import OWN, Resolved, override, settings_by_rule

KEY = "infllm"  # in vLLM's additional_config
_GIVEN = f"additional_config[{KEY!r}]"
STAY_DENSE = f"to serve the model densely, pass --additional-config '{{\"{KEY}\": false}}'"


def read_settings(
    additional_config: object,
    model_config: object,
    has_float8: Callable[[], bool],
    suits_score_dims: Callable[[int], bool],
) -> Resolved | None:
    """Read what a model is to be served with.

    Args:
        additional_config: vLLM's setting of this name. Its value under ``infllm`` is true for the
            settings of ``patch_model(model)``; a mapping for those of ``patch_model(model,
            **mapping)``; or false.
        model_config: The model's config, for its ``sparse_config``.
        has_float8: Asks whether the device multiplies float8.
        suits_score_dims: Asks whether the model suits so many ``score_dims``.

    Returns:
        The settings; None for a model that asks for nothing, or where the user declined.

    Raises:
        ValueError: Unknown names, impossible values, or a setting that has no effect in vLLM.
    """
    own = getattr(model_config, "sparse_config", None)
    given = _read_given(additional_config) if isinstance(additional_config, Mapping) else None
    if given is False or (own is None and given is None):
        return None
    if own is None:
        resolved = settings_by_rule(
            has_float8(), read_heads_of_config(model_config), suits_score_dims
        )
    else:
        resolved = _read_own(model_config)
    if given is None or given is True:
        return _without_engine(resolved)
    try:
        config = override(resolved, given).config
    except ValueError as error:
        raise ValueError(f"{_GIVEN}: {error}") from None
    return _without_engine(Resolved(config, _GIVEN))


def _without_engine(resolved: Resolved) -> Resolved:
    """Return the settings; a choice of engine among them is refused, since pages have one."""
    config, origin = resolved
    if config.engine != "auto":
        raise ValueError(
            f"{origin}: engine must be auto or left out, got {config.engine!r}: vLLM's pages are "
            "served by operators of their own"
        )
    return resolved


def _read_own(model_config: object) -> Resolved:
    try:
        return Resolved(InfLLMConfig.from_model_config(model_config), OWN)
    except ValueError as error:
        raise ValueError(f"{OWN}: {error}; {STAY_DENSE}") from None


def _read_given(additional_config: Mapping[Any, Any]) -> Any:
    """Return a mapping of settings, true or false; None where the user asks for nothing."""
    for name in additional_config:
        if name != KEY and _looks_like_key(name):
            raise ValueError(
                f"additional_config[{name!r}] is read by nothing: the settings of InfLLM-V2 go "
                f"under {KEY!r}"
            )
    if KEY not in additional_config:
        return None
    given = additional_config[KEY]
    if given is None:
        return False
    if isinstance(given, bool | Mapping):
        return given
    raise ValueError(f"{_GIVEN} must be a mapping of settings, true or false, got {given!r}")


def _looks_like_key(name: object) -> bool:
    """Whether the first word of a name is the plugin's, but for case and a letter or two."""
    first = re.split(r"[^a-z]", str(name).lower())[0]
    return bool(difflib.get_close_matches(first, [KEY], cutoff=0.8))
