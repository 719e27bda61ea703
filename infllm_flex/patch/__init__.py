"""`patch_model` and what belongs to it; each way into a model is a module of its own."""

from infllm_flex.patch.api import dense, patch_model, unpatch_model
from infllm_flex.patch.errors import UnsupportedModelError
from infllm_flex.patch.report import LayerRow, LayerTable, describe

__all__ = [
    "LayerRow",
    "LayerTable",
    "UnsupportedModelError",
    "dense",
    "describe",
    "patch_model",
    "unpatch_model",
]
