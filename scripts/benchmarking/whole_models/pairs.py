"""The dense and the patched model of a comparison: two models over the same weights."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarking.whole_models.activations import (
    make_text_like,
    random_embeddings,
    text_like_embeddings,
)
from benchmarking.whole_models.settings import Activations, ModelShape, RunSettings
from infllm_flex.patch import patch_model
from infllm_flex.training.quiet import quiet_transformers


class Pair(NamedTuple):
    """Two models with the same weights in memory once.

    Attributes:
        dense: The model as transformers makes it.
        sparse: The same model, patched.
        shape: Its shape.
        layers: Its number of layers.
        activations: Kind of its weights and inputs.
    """

    dense: Any
    sparse: Any
    shape: ModelShape
    layers: int
    activations: Activations

    def embeddings(self, batch: int, length: int, seed: int) -> Tensor:
        """Draw the embeddings of a prompt, ``[batch, length, width]``."""
        if self.activations == "random":
            return random_embeddings(self.dense, batch, length, seed)
        weight = self.dense.get_input_embeddings().weight
        return text_like_embeddings(
            batch, length, weight.shape[1], weight.dtype, weight.device, seed
        )


def build_pair(
    run: RunSettings, shape: ModelShape, layers: int, activations: Activations, positions: int
) -> Pair:
    """Build a model on the run's device and patch a twin of it.

    Args:
        run: Device, dtype and seed.
        shape: Sizes of the model.
        layers: Layers to build; 0: all.
        activations: Kind of weights.
        positions: Tokens of the longest sequence.
    """
    layers = layers or shape.num_layers
    with quiet_transformers() as transformers:
        config = _config(transformers, shape, layers, positions)
        torch.manual_seed(run.seed)
        with torch.device(run.device):
            dense = transformers.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, run.dtype), trust_remote_code=False
            )
    dense = dense.eval()
    if activations == "text":
        make_text_like(dense, shape.num_kv_heads, shape.head_dim, run.seed)
    return Pair(dense, patched_twin(dense, shape), shape, layers, activations)


def patched_twin(dense: nn.Module, shape: ModelShape) -> nn.Module:
    """Copy a model, except for its weights, and patch the copy."""
    kept: dict[int, Any] = {id(x): x for x in (*dense.parameters(), *dense.buffers())}
    return patch_model(copy.deepcopy(dense, kept), shape.attention)


def _config(transformers: Any, shape: ModelShape, layers: int, positions: int) -> Any:
    sizes = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if shape.family == "minicpm":
        from infllm_flex.minicpm.config import MiniCPMConfig

        # The released 8B models scale by these.
        scales = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
        return MiniCPMConfig(**sizes, **scales, rope_theta=shape.rope_theta)
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.family == "qwen3":
        return transformers.Qwen3Config(**sizes, rope_parameters=rope, head_dim=shape.head_dim)
    return transformers.LlamaConfig(**sizes, rope_parameters=rope)
