"""The model of a run: created with random weights, or loaded from a local folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infllm_flex.config import InfLLMConfig
from infllm_flex.patch import describe, unpatch_model
from infllm_flex.training.data import BYTE_VALUES
from infllm_flex.training.model_config import read_config
from infllm_flex.training.model_weights import load_weights
from infllm_flex.training.quiet import quiet_transformers
from infllm_flex.training.settings import ModelSettings, TinyModelSettings


def build_model(settings: ModelSettings, length: int) -> Any:
    """Create or load the model, on the CPU and in training mode.

    Args:
        settings: The ``model`` section.
        length: Number of positions of a model with random weights.
    """
    dtype = getattr(torch, settings.dtype)
    if settings.path is None:
        assert settings.tiny is not None  # the settings hold exactly one source
        with quiet_transformers() as transformers:
            config = _tiny_llama(transformers, settings.tiny, length)
            model = transformers.LlamaForCausalLM(config).to(dtype)
    else:
        model = load_model(settings.path, dtype, "model.path")
    return _with_architecture(model).train()


def build_meta_model(settings: ModelSettings, length: int) -> Any:
    """The model of `build_model` on the meta device, without memory for its weights."""
    with quiet_transformers() as transformers, torch.device("meta"):
        if settings.path is None:
            assert settings.tiny is not None  # `find_model` has replaced hub by path
            config = _tiny_llama(transformers, settings.tiny, length)
        else:
            config = read_config(transformers, settings.path)
        dtype = getattr(torch, settings.dtype)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
    return _with_architecture(model).train()


def build_empty_model(settings: ModelSettings, length: int) -> Any:
    """The model of `build_model` with uninitialised weights, on the CPU."""
    model = build_meta_model(settings, length).to_empty(device="cpu")
    model.tie_weights()
    return model


def _with_architecture(model: Any) -> Any:
    # Recorded before FSDP, which replaces the class of the model.
    model.config.architectures = [type(model).__name__]
    return model


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a model in order; each is sharded, compiled and recomputed as a unit.

    Raises:
        ValueError: The decoder has no ``layers``.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} has no list of decoder layers, which sharding and activation "
            "checkpointing need: train a model whose get_decoder() has a ModuleList `layers`"
        )
    return list(layers)


def load_model(
    folder: Path, dtype: torch.dtype = torch.float32, setting: str = "model folder"
) -> Any:
    """Load a causal LM from a local folder: safetensors only, no download, no code of the folder.

    The model is dense even if it has a ``sparse_config``; stages and scripts patch it.

    Args:
        folder: The model folder.
        dtype: Dtype of the weights.
        setting: Name of the setting or option of the folder, for messages.

    Raises:
        ValueError: The folder cannot be read, or its tensors do not match the model.
    """
    with quiet_transformers() as transformers:
        config = read_config(transformers, Path(folder))
    model = load_weights(folder, setting, config=config, dtype=dtype, use_safetensors=True)
    patched = any(row.patched_through for row in describe(model))
    return unpatch_model(model) if patched else model


def _tiny_llama(transformers: Any, tiny: TinyModelSettings, length: int) -> Any:
    return transformers.LlamaConfig(
        vocab_size=BYTE_VALUES,
        num_hidden_layers=tiny.num_layers,
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.intermediate_size,
        num_attention_heads=tiny.num_heads,
        num_key_value_heads=tiny.num_kv_heads,
        head_dim=tiny.head_dim,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": tiny.rope_theta},
        tie_word_embeddings=True,
        # The default special tokens, 1 and 2, are ordinary bytes here.
        bos_token_id=None,
        eos_token_id=None,
    )


def config_json(model: Any, attention: InfLLMConfig | None) -> str:
    """The text of a checkpoint's ``config.json``.

    Args:
        model: A transformers model.
        attention: Written as ``sparse_config``, which ``patch_model`` reads. None: left out.
    """
    description = json.loads(model.config.to_json_string(use_diff=True))
    if attention is not None:
        description["sparse_config"] = attention.to_sparse_config()
    return json.dumps(description, indent=2, sort_keys=True) + "\n"
