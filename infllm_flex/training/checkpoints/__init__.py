"""Checkpoints that survive a crash at any moment, in safetensors and JSON files, without pickle.

``step-00001234/`` holds the shards of all processes, ``state.json``, the model's ``config.json``
and a manifest. `export` converts a checkpoint to a model folder.
"""

from infllm_flex.training.checkpoints.contents import Checkpoint, SavedState, load, read_state
from infllm_flex.training.checkpoints.errors import CheckpointError
from infllm_flex.training.checkpoints.exporting import export, export_newest, is_export_of
from infllm_flex.training.checkpoints.keeping import (
    clear,
    discard_first,
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
    "discard_first",
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
