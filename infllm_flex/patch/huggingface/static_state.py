"""The state of a static cache layer, made outside of compiled graphs. Imports Dynamo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.huggingface.cache_state import State


@torch.compiler.disable(
    reason="the memory of a graph is used again, so compressed keys are allocated outside: "
    "call the model once without torch.compile with a new static cache"
)
def begin_state(layer: Any, key: Tensor, config: InfLLMConfig) -> State:
    """Make the empty state of a static layer; a graph breaks here when it first meets a cache."""
    state = State.begin(config, key, layer.keys)
    keys = state.compressed_keys
    for tensor in (keys.compressed, keys.coarse, keys.start, keys.end, state.no_padding):
        torch._dynamo.mark_static_address(tensor)
    return state
