"""Check a model that vLLM is about to load for the rotary embedding that `score_dims` expects.

vLLM's layers do not show it before they are loaded. Those of transformers do, which are made here
of the same config, without memory for weights.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import discovery
from infllm_flex.patch.huggingface.transformers_private import set_own_implementation
from infllm_flex.patch.rotary_layout import check_score_dims, suits_score_dims
from infllm_flex.vllm.settings import STAY_DENSE


def check_rotation(text_config: Any, config: InfLLMConfig) -> None:
    """Refuse ``score_dims`` for a model that does not rotate its dims as it expects.

    Args:
        text_config: transformers' config of the language model.
        config: Settings of the model.

    Raises:
        ValueError: The model rotates otherwise, or transformers does not know it.
    """
    if not config.score_dims:
        return
    try:
        model = _make_model(text_config)
    except Exception as error:  # whatever a model's own code raises
        raise ValueError(
            f"score_dims cannot be checked: transformers makes no model of {text_config.model_type}"
            f" ({type(error).__name__}: {error}); set score_dims=0; {STAY_DENSE}"
        ) from None
    layers = discovery.sparse_modules(discovery.find_layers(model))
    if not layers:
        raise ValueError(
            f"score_dims cannot be checked: no layer of transformers' {type(model).__name__} can "
            f"be sparse; set score_dims=0; {STAY_DENSE}"
        )
    try:
        check_score_dims(model, layers, config)
    except ValueError as error:
        raise ValueError(f"InfLLM-V2 in vLLM: {error}; {STAY_DENSE}") from None


def is_known_to_suit(text_config: Any, score_dims: int) -> bool:
    """Whether a model of this config suits ``score_dims``, as far as transformers knows it."""
    try:
        known = _Config(text_config)
    except Exception:  # JSON has no words for some value, or the config writes its own JSON
        return _ask_layers(text_config, score_dims)
    return _ask_layers_once(known, score_dims)


class _Config:
    """A config that is told from others by its values."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._values = config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and other._values == self._values

    def __hash__(self) -> int:
        return hash(self._values)


@functools.lru_cache(maxsize=8)  # vLLM asks in each layer
def _ask_layers_once(text_config: _Config, score_dims: int) -> bool:
    return _ask_layers(text_config.config, score_dims)


def _ask_layers(text_config: Any, score_dims: int) -> bool:
    try:
        model = _make_model(text_config)
    except Exception:  # whatever a model's own code raises
        return False
    layers = discovery.sparse_modules(discovery.find_layers(model))
    return suits_score_dims(model, layers, score_dims)


def _make_model(text_config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(text_config)
    set_own_implementation(config, None)  # the one that it names may not be installed
    with torch.device("meta"):
        # Without trust_remote_code=False transformers may ask on the terminal, and wait.
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
