"""Which models are served sparsely: those that have settings, in their folder or from the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.head_groups import read_heads_of_config
from infllm_flex.patch.settings import OWN, Resolved, override, settings_by_rule

KEY = "infllm"  # in vLLM's additional_config
STAY_DENSE = f"to serve the model densely, pass --additional-config '{{\"{KEY}\": false}}'"


class Served(NamedTuple):
    """Settings of a served model, and where they come from."""

    config: InfLLMConfig
    origin: str


def read_settings(
    additional_config: object, model_config: object, has_float8: Callable[[], bool]
) -> Served | None:
    """Read what a model is to be served with.

    Args:
        additional_config: vLLM's setting of this name. Its value under ``infllm`` is true for the
            settings of ``patch_model(model)``; a mapping for those of ``patch_model(model,
            **mapping)``; or false.
        model_config: The model's config, for its ``sparse_config``.
        has_float8: Asks whether the device multiplies float8.

    Returns:
        The settings; None for a model that asks for nothing, or where the user declined.

    Raises:
        ValueError: Unknown names or impossible values.
    """
    own = getattr(model_config, "sparse_config", None)
    given: Any = None
    if isinstance(additional_config, Mapping) and KEY in additional_config:
        given = additional_config[KEY]
        if given is None or given is False:
            return None
        if given is not True and not isinstance(given, Mapping):
            raise ValueError(
                f"additional_config[{KEY!r}] must be a mapping of settings, true or false, "
                f"got {given!r}"
            )
    if own is None and given is None:
        return None
    if own is None:
        resolved = settings_by_rule(has_float8(), read_heads_of_config(model_config))
    else:
        resolved = Resolved(InfLLMConfig.from_model_config(model_config), OWN)
    if given is None or given is True:
        return Served(*resolved)
    return Served(override(resolved, given).config, f"additional_config[{KEY!r}]")
