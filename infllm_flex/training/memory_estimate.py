"""Estimate the memory of a run on each device, without loading the weights."""

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
from infllm_flex.training.attention_shapes import attention_shape, layer_configs
from infllm_flex.training.model import decoder_layers
from infllm_flex.training.selection_loss.divergence import CHUNK_PRODUCTS
from infllm_flex.training.settings import StageSettings, TrainingSettings

_GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per process.

    Attributes:
        weights: Weights in ``model.dtype``.
        gradients: Gradients of the weights.
        optimizer: Optimizer state.
        gathered: Unsharded layers that FSDP gathers for use, and the gradient of one layer.
        activations: Tensors kept for the backward pass, and the working memory of a layer.
        process: On the CPU, the interpreter and the libraries. 0 on other devices.
        fragmentation: On the CPU, freed memory that the heap cannot reuse, at its most. It differs
            between equal runs, because the system places the heap at random. 0 on other devices.
        saved: On the CPU, the copy of weights and optimizer state made while a checkpoint is
            written. It never coexists with activations.
        offloaded: Whether weights, gradients and optimizer state are in CPU memory instead.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    process: int
    fragmentation: int
    saved: int
    offloaded: bool

    @property
    def total(self) -> int:
        """Bytes on the device at the peak."""
        permanent = 0 if self.offloaded else self.weights + self.gradients + self.optimizer
        passing = max(self.gathered + self.activations, self.saved)
        return permanent + passing + self.process + self.fragmentation

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "gathered layers": self.gathered,
            "activations": self.activations,
        }
        if self.process:
            parts["process"] = self.process + self.fragmentation
        if self.saved > self.gathered + self.activations:
            parts["instead of the last two, while saving"] = self.saved
        text = ", ".join(f"{name} {value / _GIB:.1f}" for name, value in parts.items())
        where = " (the first three on the CPU)" if self.offloaded else ""
        return f"{self.total / _GIB:.1f} GiB on each device: {text}{where}"


def estimate_memory(
    model: Any, settings: TrainingSettings, processes: int, device: torch.device
) -> MemoryEstimate:
    """Estimate the peak memory of a run.

    Args:
        model: A transformers model, possibly on the meta device.
        settings: Settings of the run.
        processes: Number of processes.
        device: The training device.
    """
    layers = decoder_layers(model)
    weights = _bytes(model)
    largest_layer = max(_bytes(layer) for layer in layers)
    rest = weights - sum(_bytes(layer) for layer in layers)
    shards = processes if settings.parallel.kind == "fsdp" else 1
    gathered = 0
    if shards > 1 or settings.memory.cpu_offload:
        # The layer in use, the prefetched layer and one gradient. The rest (embeddings and head)
        # stays gathered, weights and gradients.
        ratio = _arithmetic_bytes(settings) / _dtype_bytes(settings.model.dtype)
        gathered = int((3 * largest_layer + 2 * rest) * ratio)
    stages = settings.stages.values()
    optimizer = _optimizer_bytes(model, settings) // shards
    process = fragmentation = saved = 0
    if device.type == "cpu":
        saved = weights // shards + optimizer
        process = _resident_bytes()
        fragmentation = max(
            _fragmentation_bytes(model, stage, settings, processes) for stage in stages
        )
    return MemoryEstimate(
        weights=weights // shards,
        gradients=weights // shards,
        optimizer=optimizer,
        gathered=gathered,
        activations=max(_activation_bytes(model, stage, settings, processes) for stage in stages),
        process=process,
        fragmentation=fragmentation,
        saved=saved,
        offloaded=settings.memory.cpu_offload,
    )


def _activation_bytes(
    model: Any, stage: StageSettings, settings: TrainingSettings, processes: int
) -> int:
    config = model.config
    _, tokens = _micro_batch_size(stage, settings, processes)
    layers = [_layer_bytes(own, stage, settings, processes) for own in layer_configs(config)]
    hidden_states = tokens * config.hidden_size * _arithmetic_bytes(settings)
    kept = sum(layers)
    if settings.memory.activation_checkpointing:
        kept = len(layers) * hidden_states + max(layers)
    # Logits and their gradient, each also in the precision of the products.
    logits = 4 * min(settings.memory.logits_mib * 2**20, 4 * tokens * config.vocab_size)
    # A gradient is complete before it is accumulated. FSDP's gradient is counted as gathered.
    sharded = settings.parallel.kind == "fsdp" and processes > 1
    gradient = 0 if sharded else max(weight.nbytes for weight in model.parameters())
    selection = _selection_loss_bytes(model, stage, settings, processes)
    return kept + 4 * hidden_states + max(logits, selection) + gradient


def _layer_bytes(
    config: Any, stage: StageSettings, settings: TrainingSettings, processes: int
) -> int:
    """Bytes of the tensors that a layer of this config keeps for the backward pass."""
    context = settings.parallel.context
    rows, tokens = _micro_batch_size(stage, settings, processes)
    size = _arithmetic_bytes(settings)
    heads, kv_heads, head_dim, _ = attention_shape(config)
    hidden, inner = config.hidden_size, config.intermediate_size
    # Two norms keep input and result, one of each in float32. The gated feed-forward layer keeps
    # four tensors of its width. Attention keeps its input, queries and output, and keys and values
    # before and after the rotary embedding.
    attention = 5 * heads * head_dim + 6 * kv_heads * head_dim
    layer = tokens * (size * (2 * hidden + attention + 4 * inner) + 8 * hidden)
    if stage.attention == "sparse" and not settings.attention.is_dense(stage.max_length):
        # The selected blocks, the lists of the tiles, and the inputs of both.
        layer += tokens * kv_heads * settings.attention.num_selected * 4 * 2
        if settings.attention.dense_by == "position":
            # The outputs of dense and of sparse queries, beside the two joined.
            layer += tokens * heads * head_dim * size
    if stage.selection_loss:
        sampled = rows * stage.selection_loss.queries
        layer += (tokens * kv_heads + sampled * heads) * head_dim * size
    if context > 1:
        layer += 3 * 2 * rows * stage.max_length * kv_heads * head_dim * size
    return layer


def _selection_loss_bytes(
    model: Any, stage: StageSettings, settings: TrainingSettings, processes: int
) -> int:
    """Bytes of the dot products of some sampled queries, and of all keys in float32."""
    if stage.selection_loss is None:
        return 0
    _, tokens = _micro_batch_size(stage, settings, processes)
    most = 0
    for heads, kv_heads, head_dim, _ in map(attention_shape, layer_configs(model.config)):
        products = min(CHUNK_PRODUCTS, stage.selection_loss.queries * tokens * heads)
        # Logits, weights and their gradients; keys, their means and the gradients of both.
        size = 4 * (5 * max(products, tokens * heads) + 4 * tokens * kv_heads * head_dim)
        most = max(most, size)
    return most


def _fragmentation_bytes(
    model: Any, stage: StageSettings, settings: TrainingSettings, processes: int
) -> int:
    """Bytes that layers free between kept tensors and that the C library cannot reuse.

    The heap serves an aligned allocation only from a free block larger than the request. The next
    layer asks for the sizes that the last one freed, so it cannot use those blocks until the
    backward pass frees their neighbours.
    """
    _, tokens = _micro_batch_size(stage, settings, processes)
    size = _arithmetic_bytes(settings)
    configs, freed = layer_configs(model.config), []
    for own in configs:
        heads, kv_heads, head_dim, _ = attention_shape(own)
        # The squares of two norms and two residual branches; three products of the rotary
        # embedding.
        freed.append(tokens * (4 * own.hidden_size + 3 * (heads + kv_heads) * head_dim) * size)
    if settings.memory.activation_checkpointing:
        # New gradients occupy the memory of the previous layers before the next one is recomputed,
        # and cannot reuse the memory of the previous step's gradients.
        layer = max(_layer_bytes(own, stage, settings, processes) for own in configs)
        return max(freed) + 2 * layer + _bytes(model)
    return sum(freed)


def _micro_batch_size(
    stage: StageSettings, settings: TrainingSettings, processes: int
) -> tuple[int, int]:
    """Sequences and tokens of one micro-batch of a process."""
    context = settings.parallel.context
    rows = stage.batch_size * context // processes
    rows = min(rows, stage.sequences_at_once or rows)
    return rows, rows * stage.max_length // context


def _resident_bytes() -> int:
    """Memory of this process without weights: the interpreter, the libraries and their buffers."""
    # A run imports these when it first recomputes a layer or saves.
    for name in ("torch._dynamo", "torch.distributed.checkpoint", "safetensors.torch"):
        importlib.import_module(name)
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
        # Two moments of one byte each, and a float32 scale for every 256 values.
        return 2 * (weights // _dtype_bytes(settings.model.dtype)) * 65 // 64
    if settings.optim.kind == "muon":
        # One moment for the matrices of the layers, two for the rest.
        matrices = sum(w.nbytes for layer in decoder_layers(model) for w in _matrices(layer))
        return 2 * weights - matrices
    return 2 * weights


def _matrices(layer: nn.Module) -> list[torch.Tensor]:
    return [weight for weight in layer.parameters() if weight.ndim == 2]


def _bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


def _dtype_bytes(name: str) -> int:
    return getattr(torch, name).itemsize


def _arithmetic_bytes(settings: TrainingSettings) -> int:
    name = settings.model.arithmetic
    return _dtype_bytes(settings.model.dtype if name == "weights" else name)
