"""Check `score_dims` against the rotary embedding of a model that vLLM is about to load."""

from __future__ import annotations

import copy
from typing import Any

import torch

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import discovery
from infllm_flex.patch.rotary_layout import check_score_dims
from infllm_flex.vllm.settings import STAY_DENSE


def check_rotation(text_config: Any, config: InfLLMConfig) -> None:
    """Refuse ``score_dims`` for a model that does not rotate its dims as it expects.

    vLLM's layers do not show this before they are loaded. Those of transformers do, which are made
    here of the same config, without memory for weights.

    Args:
        text_config: transformers' config of the language model.
        config: Settings of the model.

    Raises:
        ValueError: The model rotates otherwise, or transformers does not know it.
    """
    if not config.score_dims:
        return
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(text_config))
    except Exception as error:  # whatever a model's own code raises
        raise ValueError(
            f"score_dims cannot be checked: transformers makes no model of {text_config.model_type}"
            f" ({type(error).__name__}: {error}); set score_dims=0; {STAY_DENSE}"
        ) from None
    found = discovery.find_layers(model).items()
    layers = {name: layer.module for name, layer in found if layer.skip_reason is None}
    try:
        check_score_dims(model, layers, config)
    except ValueError as error:
        raise ValueError(f"InfLLM-V2 in vLLM: {error}; {STAY_DENSE}") from None
