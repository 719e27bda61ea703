"""The configuration of a local model folder, also of MiniCPM 4, and folders of the hub's cache."""

from __future__ import annotations

import dataclasses
import json
import math
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
        ValueError: transformers does not know the model.
    """
    try:
        raw = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path: {folder / 'config.json'} cannot be read: {error}") from error
    if raw.get("model_type") == "minicpm":
        return _from_minicpm(transformers, raw)
    return transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )


def _from_minicpm(transformers: Any, raw: dict[str, Any]) -> Any:
    """MiniCPM 1 and 4 as the Granite they are: a Llama whose parts are scaled, names and all.

    MiniCPM comes with code of its own instead of a place in transformers. It scales embeddings by
    ``scale_emb``, what each half of a layer adds by ``scale_depth / sqrt(layers)``, and the input
    of the head by ``dim_model_base / hidden_size``; Granite has a setting for each.
    """
    if raw.get("num_experts", 0):
        raise ValueError("model.path: MiniCPM with experts is not known to transformers")
    layers, hidden = raw["num_hidden_layers"], raw["hidden_size"]
    head_dim = hidden // raw["num_attention_heads"]
    rope = {"rope_type": "default", **(raw.get("rope_scaling") or {})}
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "attention_bias",
        "attention_dropout",
        "sparse_config",
    )
    return transformers.GraniteConfig(
        **{name: raw[name] for name in same if name in raw},
        rope_parameters={"rope_theta": raw.get("rope_theta", 10_000.0), **rope},
        tie_word_embeddings=raw.get("tie_word_embeddings", True),
        embedding_multiplier=raw.get("scale_emb", 1),
        residual_multiplier=raw.get("scale_depth", 1) / math.sqrt(layers),
        logits_scaling=hidden / raw.get("dim_model_base", 1),
        attention_multiplier=head_dim**-0.5,
    )
