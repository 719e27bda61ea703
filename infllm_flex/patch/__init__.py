"""`patch_model` and its companions. Each kind of model is served by an adapter, one module each."""

from infllm_flex.patch.api import dense, patch_model, unpatch_model
from infllm_flex.patch.errors import UnsupportedModelError
from infllm_flex.patch.layer_state import LayerAttend, LayerObserve
from infllm_flex.patch.override import attend_through, observe_attention
from infllm_flex.patch.report import LayerRow, LayerTable, describe

__all__ = [
    "LayerAttend",
    "LayerObserve",
    "LayerRow",
    "LayerTable",
    "UnsupportedModelError",
    "attend_through",
    "dense",
    "describe",
    "observe_attention",
    "patch_model",
    "unpatch_model",
]
