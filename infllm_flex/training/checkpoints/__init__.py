"""Checkpoints that survive a crash at any moment: safetensors and JSON, no pickle anywhere.

``step-00001234/`` holds each process's part of all tensors, ``state.json``, the model's
``config.json``, and a manifest. `export` makes a model folder of it.
"""

from infllm_flex.training.checkpoints.contents import Checkpoint, SavedState, load, read_state
from infllm_flex.training.checkpoints.errors import CheckpointError
from infllm_flex.training.checkpoints.exporting import export, export_newest, is_export_of
from infllm_flex.training.checkpoints.keeping import (
    clear,
    discard_start,
    last_step,
    newest,
    path_of,
    save,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "SavedState",
    "clear",
    "discard_start",
    "export",
    "export_newest",
    "is_export_of",
    "last_step",
    "load",
    "newest",
    "path_of",
    "read_state",
    "save",
]
