"""The configuration of a local model folder, and model folders in the hub's cache."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from infllm_flex.training.settings import TrainingSettings


def find_model(settings: TrainingSettings) -> TrainingSettings:
    """Replace ``model.hub`` by ``model.path``; downloads the model if ``model.download`` is set.

    Raises:
        ValueError: The model is not in the local cache, or the download failed.
    """
    model = settings.model
    if model.hub is None:
        return settings
    folder = find_on_hub(model.hub, model.revision, model.download, "model")
    found = dataclasses.replace(model, path=folder, hub=None, revision="main", download=False)
    return dataclasses.replace(settings, model=found)


def find_on_hub(name: str, revision: str, download: bool, section: str) -> Path:
    """The folder of a hub model in the local cache.

    Args:
        name: Name on the hub, such as ``Qwen/Qwen3-8B``.
        revision: A commit, tag or branch.
        download: Whether to download files that are not in the cache.
        section: Section of the settings to name in messages.

    Raises:
        ValueError: The model is not in the local cache, or the download failed.
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
            f"{section}.hub: {name} is not in the local cache: set {section}.download to true to "
            f"download it once, or use a local folder of the model"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"{section}.hub: {name} cannot be downloaded: {error}") from error
    return Path(folder)


def read_config(transformers: Any, folder: Path) -> Any:
    """Read the configuration of a model folder without running the folder's code.

    Args:
        transformers: The imported module.
        folder: The model folder with a ``config.json``.

    Raises:
        ValueError: ``config.json`` cannot be read, or its model type is unknown.
    """
    try:
        json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path: {folder / 'config.json'} cannot be read: {error}") from error
    return transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
