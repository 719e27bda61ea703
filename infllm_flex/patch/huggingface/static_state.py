"""Make the state of a static cache layer outside of compiled graphs. Imports Dynamo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch.huggingface.cache_state import CacheState
from infllm_flex_ops import torch_private


@torch.compiler.disable(
    reason="graphs reuse their memory, so compressed keys are allocated outside of them: "
    "call the model once without torch.compile with a new static cache"
)
def begin_state(layer: Any, key: Tensor, config: InfLLMConfig) -> CacheState:
    """Make the empty state of a static layer. A graph breaks here at its first call of a cache."""
    state = CacheState.begin(config, key, layer.keys)
    keys = state.compressed_keys
    for tensor in (keys.compressed, keys.coarse, keys.start, keys.end, state.no_padding):
        torch_private.mark_static_address(tensor)
    return state
