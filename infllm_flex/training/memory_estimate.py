"""How much memory a run will need on each device: an estimate, made without the weights."""

from __future__ import annotations

import importlib
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from infllm_flex.process_memory import peak_resident_bytes
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
        process: On the CPU, the program and its libraries, and what it freed but cannot give back.
            0 on other devices, whose memory holds tensors only.
        saved: On the CPU, the copy of weights and state that a checkpoint is written from, when
            there are no activations.
        offloaded: Of the first three, what lies in the memory of the CPU instead.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    process: int
    saved: int
    offloaded: bool

    @property
    def total(self) -> int:
        """On the device."""
        kept = 0 if self.offloaded else self.weights + self.gradients + self.optimizer
        return kept + max(self.gathered + self.activations, self.saved) + self.process

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "gathered layers": self.gathered,
            "activations": self.activations,
        }
        if self.process:
            parts["process"] = self.process
        if self.saved > self.gathered + self.activations:
            parts["in their place a checkpoint"] = self.saved
        text = ", ".join(f"{name} {value / _GIB:.1f}" for name, value in parts.items())
        where = " (the first three on the CPU)" if self.offloaded else ""
        return f"{self.total / _GIB:.1f} GiB on each device: {text}{where}"


def estimate_memory(
    model: Any, settings: TrainingSettings, processes: int, device: torch.device
) -> MemoryEstimate:
    """Add up what a run holds at its fullest moment.

    Args:
        model: Also without weights.
        settings: The whole run.
        processes: That share it.
        device: Where it will run.
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
    stages = settings.stages.values()
    optimizer = _optimizer_bytes(model, settings) // cut
    process = saved = 0
    if device.type == "cpu":
        saved = weights // cut + optimizer
        process = _resident_bytes()
        process += max(_hole_bytes(model, stage, settings, processes) for stage in stages)
    return MemoryEstimate(
        weights=weights // cut,
        gradients=weights // cut,
        optimizer=optimizer,
        gathered=gathered,
        activations=max(_activation_bytes(model, stage, settings, processes) for stage in stages),
        process=process,
        saved=saved,
        offloaded=settings.memory.cpu_offload,
    )


def _activation_bytes(
    model: Any, stage: StageSettings, settings: TrainingSettings, processes: int
) -> int:
    config = model.config
    _, tokens = _load(stage, settings, processes)
    layer, layers = _layer_bytes(model, stage, settings, processes), config.num_hidden_layers
    stream = tokens * config.hidden_size * _arithmetic_bytes(settings)
    kept = layers * stream + layer if settings.memory.activation_checkpointing else layers * layer
    # Logits and their gradient, each also in the precision of the products.
    logits = 4 * min(settings.memory.logits_mib * 2**20, 4 * tokens * config.vocab_size)
    # A gradient is whole before it is added to what is there; FSDP's is among what it gathers.
    alone = settings.parallel.kind != "fsdp" or processes == 1
    gradient = max(weight.nbytes for weight in model.parameters()) if alone else 0
    return kept + 4 * stream + logits + gradient


def _layer_bytes(
    model: Any, stage: StageSettings, settings: TrainingSettings, processes: int
) -> int:
    """What a layer keeps for the backward."""
    context, config = settings.parallel.context, model.config
    rows, tokens = _load(stage, settings, processes)
    size = _arithmetic_bytes(settings)
    heads, kv_heads, head_dim = _heads(config)
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
    return layer


def _hole_bytes(
    model: Any, stage: StageSettings, settings: TrainingSettings, processes: int
) -> int:
    """What layers free between tensors that they keep, where the C library can't reuse it.

    Its heap gives an aligned block out of a larger hole only: what one layer frees, the next one,
    which asks for the same sizes, does not get, until the backward frees the neighbours, too.
    """
    _, tokens = _load(stage, settings, processes)
    heads, kv_heads, head_dim = _heads(model.config)
    # The squares of two norms and two residual branches; three products of the rotary embedding.
    freed = 4 * model.config.hidden_size + 3 * (heads + kv_heads) * head_dim
    holes = tokens * freed * _arithmetic_bytes(settings)
    if settings.memory.activation_checkpointing:
        # Gradients settle where the last layer was, before the next one is computed again; nor do
        # they find room where those of the last step were.
        return holes + _layer_bytes(model, stage, settings, processes) + _bytes(model)
    return model.config.num_hidden_layers * holes


def _load(stage: StageSettings, settings: TrainingSettings, processes: int) -> tuple[int, int]:
    """Sequences and tokens that a process has in a pass."""
    context = settings.parallel.context
    rows = stage.batch_size * context // processes
    rows = min(rows, stage.sequences_at_once or rows)
    return rows, rows * stage.max_length // context


def _heads(config: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads and their width."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, config.num_key_value_heads, head_dim


def _resident_bytes() -> int:
    """What this process holds before it holds a weight: interpreter, libraries, their buffers."""
    for late in ("torch._dynamo", "torch.distributed.checkpoint", "safetensors.torch"):
        importlib.import_module(late)  # a run loads them when it first recomputes, or saves
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(256, 256)
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        F.cross_entropy(layer(torch.rand(256, 256)), torch.arange(256)).backward()
    optimizer.step()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_resident_bytes()
    return pages * resource.getpagesize()


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
