"""The model FLOPs of a training step, and its tokens that attend sparsely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from infllm_flex.config import InfLLMConfig
from infllm_flex.selection import count_score_products
from infllm_flex.training.attention_shapes import AttentionShape, attention_shapes
from infllm_flex.training.settings import StageSettings

# Peak dense bfloat16 FLOP/s from the data sheets; the first matching name counts.
_PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device, tflops: float | None) -> float | None:
    """Peak FLOP/s of a device; None if unknown.

    Args:
        device: The device.
        tflops: The peak in TFLOP/s as the settings give it, or None to look it up.
    """
    if tflops is not None:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)


def document_lengths(length: int, rows: int, positions: Tensor | None) -> list[int]:
    """Lengths of the documents of a batch.

    Args:
        length: Tokens per row.
        rows: Rows of the batch.
        positions: ``[B, S]``, 0 at the start of each document. None: each row is one document.
    """
    if positions is None:
        return [length] * rows
    starts = (positions.flatten() == 0).nonzero().flatten()
    end = torch.tensor([positions.numel()], device=starts.device)
    return torch.cat([starts, end]).diff().tolist()


class FlopCounter:
    """Model FLOPs of documents, forward and backward; recomputation is not counted.

    Args:
        model: A transformers model.
        stage: The stage, which has sparse or dense attention.
        attention: Settings of the sparse attention.
    """

    def __init__(self, model: Any, stage: StageSettings, attention: InfLLMConfig) -> None:
        self._sparse, self._attention = stage.attention == "sparse", attention
        self._layers = Counter(attention_shapes(model.config))
        self._per_token = 6 * _weights_per_token(model)

    def sparse_tokens(self, lengths: Iterable[int]) -> int:
        """Number of tokens that attend sparsely."""
        return sum(length - self._count_dense(length) for length in lengths)

    def flops(self, lengths: Iterable[int]) -> float:
        """FLOPs of a step over documents of these lengths."""
        return sum(self._document_flops(length) for length in lengths)

    def _count_dense(self, length: int) -> int:
        return self._attention.count_dense(length) if self._sparse else length

    def _document_flops(self, length: int) -> float:
        layers = sum(
            count * self._layer_products(layer, length) for layer, count in self._layers.items()
        )
        return length * self._per_token + 2 * layers

    def _layer_products(self, layer: AttentionShape, length: int) -> float:
        """Count the multiplications of a layer for a document."""
        # Attention has two products per pair and head, each computed once forward and twice
        # backward. Scores have theirs forward only.
        per_pair = 6 * layer.heads * layer.head_dim
        if layer.window is not None:
            return per_pair * _count_pairs(length, layer.window, layer.window)
        config, dense = self._attention, self._count_dense(length)
        budget = config.budget_tokens
        products = per_pair * _count_pairs(length, max(dense, budget), budget)
        if dense < length:
            scored = count_score_products(config, layer.heads, layer.kv_heads)
            scored *= config.num_score_dims(layer.head_dim)
            products += scored * (length * length - dense * dense) / 2
        return products


def _count_pairs(length: int, full: int, most: int) -> float:
    """Pairs of a token and one that it sees: all earlier ones up to ``full``, then ``most``."""
    full = min(full, length)
    return full * full / 2 + (length - full) * most


def _weights_per_token(model: Any) -> int:
    """Number of weights used in products: all except untied input embeddings."""
    total = sum(weight.numel() for weight in model.parameters())
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    return total if head.weight is inputs.weight else total - inputs.weight.numel()
