"""How much memory a run will need on each device: an estimate, made without the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from infllm_flex.training.model import decoder_layers
from infllm_flex.training.settings import StageSettings, TrainingSettings

_GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per process.

    Attributes:
        weights: In ``model.dtype``.
        gradients: Of the weights.
        optimizer: Its state.
        gathered: Whole layers that FSDP puts together for use, and the gradient of one.
        activations: What the forward pass keeps for the backward, and what a layer works with.
        offloaded: Of the first three, what lies in the memory of the CPU instead.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    offloaded: bool

    @property
    def total(self) -> int:
        """On the device."""
        kept = 0 if self.offloaded else self.weights + self.gradients + self.optimizer
        return kept + self.gathered + self.activations

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "gathered layers": self.gathered,
            "activations": self.activations,
        }
        text = ", ".join(f"{name} {value / _GIB:.1f}" for name, value in parts.items())
        where = " (the first three on the CPU)" if self.offloaded else ""
        return f"{self.total / _GIB:.1f} GiB on each device: {text}{where}"


def estimate_memory(model: Any, settings: TrainingSettings, processes: int) -> MemoryEstimate:
    """Add up what a run holds at its fullest moment.

    Args:
        model: Also without weights.
        settings: The whole run.
        processes: That share it.
    """
    layers = decoder_layers(model)
    weights = _bytes(model)
    whole_layer = max(_bytes(layer) for layer in layers)
    rest = weights - sum(_bytes(layer) for layer in layers)
    cut = processes if settings.parallel.kind == "fsdp" else 1
    gathered = 0
    if cut > 1 or settings.memory.cpu_offload:
        # The layer in use, the one fetched ahead, a gradient; embeddings and head throughout.
        share = _arithmetic_bytes(settings) / _dtype_bytes(settings.model.dtype)
        gathered = int((3 * whole_layer + 2 * rest) * share)
    return MemoryEstimate(
        weights=weights // cut,
        gradients=weights // cut,
        optimizer=_optimizer_bytes(model, settings) // cut,
        gathered=gathered,
        activations=max(
            _activation_bytes(model, stage, settings, processes)
            for stage in settings.stages.values()
        ),
        offloaded=settings.memory.cpu_offload,
    )


def _activation_bytes(
    model: Any, stage: StageSettings, settings: TrainingSettings, processes: int
) -> int:
    context, config = settings.parallel.context, model.config
    rows = stage.batch_size * context // processes
    rows = min(rows, stage.sequences_at_once or rows)
    tokens = rows * stage.max_length // context
    size = _arithmetic_bytes(settings)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    hidden, inner = config.hidden_size, config.intermediate_size
    # Two norms keep input and result, one of each in float32; the gated layer four of its width;
    # attention its input, queries and output, keys and values before and after the embedding.
    attention = 5 * heads * head_dim + 6 * kv_heads * head_dim
    layer = tokens * (size * (2 * hidden + attention + 4 * inner) + 8 * hidden)
    if stage.attention == "sparse" and not settings.attention.is_dense(stage.max_length):
        # The choice of blocks, its lists of tiles, and what both are made from.
        layer += tokens * kv_heads * settings.attention.num_selected * 4 * 2
    if context > 1:
        layer += 3 * 2 * rows * stage.max_length * kv_heads * head_dim * size
    layers = config.num_hidden_layers
    stream = tokens * hidden * size
    kept = layers * stream + layer if settings.memory.activation_checkpointing else layers * layer
    # Logits and their gradient, each also in the precision of the products.
    logits = 4 * min(settings.memory.logits_mib * 2**20, 4 * tokens * config.vocab_size)
    return kept + 4 * stream + logits


def _optimizer_bytes(model: Any, settings: TrainingSettings) -> int:
    weights = _bytes(model)
    if settings.optim.kind == "adamw8bit":
        # Two moments of a byte and a scale for every 256.
        return 2 * (weights // _dtype_bytes(settings.model.dtype)) * 65 // 64
    if settings.optim.kind == "muon":
        # One moment for the matrices of the layers, two for the rest.
        matrices = sum(w.nbytes for part in decoder_layers(model) for w in _matrices(part))
        return 2 * weights - matrices
    return 2 * weights


def _matrices(part: nn.Module) -> list[torch.Tensor]:
    return [weight for weight in part.parameters() if weight.ndim == 2]


def _bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


def _dtype_bytes(name: str) -> int:
    return getattr(torch, name).itemsize


def _arithmetic_bytes(settings: TrainingSettings) -> int:
    name = settings.model.arithmetic
    return _dtype_bytes(settings.model.dtype if name == "weights" else name)
