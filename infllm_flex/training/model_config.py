"""The configuration of a local model folder, and folders of the hub's cache."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from infllm_flex.training.settings import TrainingSettings


def find_model(settings: TrainingSettings) -> TrainingSettings:
    """The settings with ``model.path`` in place of ``model.hub``, downloaded where that is asked.

    Raises:
        ValueError: The model is not on this machine, or cannot be fetched.
    """
    model = settings.model
    if model.hub is None:
        return settings
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            model.hub,
            revision=model.revision,
            local_files_only=not model.download,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
        )
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"model.hub: {model.hub} is not in the cache of this machine: set model.download to "
            "true to fetch it once, or give its folder as model.path"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"model.hub: {model.hub} cannot be fetched: {error}") from error
    found = dataclasses.replace(model, path=Path(folder), hub=None, revision="main", download=False)
    return dataclasses.replace(settings, model=found)


def read_config(transformers: Any, folder: Path) -> Any:
    """The configuration of a model folder; none of the folder's code is run.

    Args:
        transformers: The module.
        folder: Holds ``config.json``.

    Raises:
        ValueError: Neither transformers nor this package knows the model.
    """
    try:
        json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path: {folder / 'config.json'} cannot be read: {error}") from error
    return transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
