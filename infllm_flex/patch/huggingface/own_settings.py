"""Make the record of a layer from its own settings, outside of graphs. Imports Dynamo."""

from __future__ import annotations

import functools

import torch
from torch import nn

from infllm_flex.patch.head_groups import read_heads
from infllm_flex.patch.huggingface.attention_layers import find_skip_reason, make_layer
from infllm_flex.patch.huggingface.cache_hook import install_cache_hook
from infllm_flex.patch.huggingface.config_view import is_view
from infllm_flex.patch.layer_state import NOT_PATCHED, PatchedLayer, set_layer
from infllm_flex.patch.rotary_layout import check_score_dims, suits_score_dims
from infllm_flex.patch.settings import read_own


@torch.compiler.disable(
    reason="for a single graph, call infllm_flex.patch_model(model) before torch.compile"
)
def make_own_layer(module: nn.Module) -> PatchedLayer:
    """Read the settings and the code of a layer, which cannot be traced."""
    device = next((weight.device for weight in module.parameters()), None)
    alone = {type(module).__name__: module}  # the model is not reached from its layers
    suits = functools.partial(suits_score_dims, None, alone)
    config, origin = read_own(module.config, device, read_heads(module, module), suits)
    skip_reason = NOT_PATCHED if is_view(module.config) else find_skip_reason(module)
    if skip_reason is None:
        check_score_dims(None, alone, config)
    layer = make_layer(module, config, skip_reason, origin=origin)
    set_layer(module, layer)
    if layer.skip_reason is None:
        install_cache_hook(module)  # works from the next call on; the first needs no state
    return layer
