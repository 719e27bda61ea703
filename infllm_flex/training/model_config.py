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
    folder = find_on_hub(model.hub, model.revision, model.download, "model")
    found = dataclasses.replace(model, path=folder, hub=None, revision="main", download=False)
    return dataclasses.replace(settings, model=found)


def find_on_hub(name: str, revision: str, download: bool, section: str) -> Path:
    """The folder of a model of the hub in the cache of this machine.

    Args:
        name: As ``Qwen/Qwen3-8B``.
        revision: A commit, tag or branch.
        download: Whether to fetch what the cache lacks.
        section: Of the settings, for messages.

    Raises:
        ValueError: The model is not on this machine, or cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            local_files_only=not download,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
        )
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{section}.hub: {name} is not in the cache of this machine: set {section}.download to "
            f"true to fetch it once, or give its folder"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"{section}.hub: {name} cannot be fetched: {error}") from error
    return Path(folder)


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
