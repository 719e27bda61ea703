"""How much a step computes: tokens, the share of them that attends sparsely, operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from infllm_flex.config import InfLLMConfig
from infllm_flex.training.settings import StageSettings

# Dense bfloat16 products per second, from the makers' data sheets; the first name that fits counts.
_PEAK = {
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


def peak_operations(device: torch.device, tflops: float | None) -> float | None:
    """Operations per second that a device can do at most; None where that is not known."""
    if tflops is not None:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK.items() if part in name), None)


def document_lengths(length: int, rows: int, positions: Tensor | None) -> list[int]:
    """Lengths of the documents of a batch.

    Args:
        length: Of a row.
        rows: Of the batch.
        positions: ``[B, S]``, 0 where a document begins; None where each row is one.
    """
    if positions is None:
        return [length] * rows
    starts = (positions.flatten() == 0).nonzero().flatten()
    end = torch.tensor([positions.numel()], device=starts.device)
    return torch.cat([starts, end]).diff().tolist()


class Work:
    """What documents cost a model, forward and backward, without what is computed twice.

    Args:
        model: A transformers model.
        stage: Says whether attention is sparse.
        attention: Of the sparse attention.
    """

    def __init__(self, model: Any, stage: StageSettings, attention: InfLLMConfig) -> None:
        self._sparse, self._attention = stage.attention == "sparse", attention
        config = model.config
        self._heads = config.num_attention_heads
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._layers = config.num_hidden_layers
        self._per_token = 6 * _weights_per_token(model)

    def sparse_tokens(self, lengths: Iterable[int]) -> int:
        """Tokens in documents that are long enough to attend sparsely."""
        return sum(length for length in lengths if self._is_sparse(length))

    def operations(self, lengths: Iterable[int]) -> float:
        """Multiplications and additions of a step over these documents."""
        return sum(self._of_document(length) for length in lengths)

    def _is_sparse(self, length: int) -> bool:
        return self._sparse and not self._attention.is_dense(length)

    def _of_document(self, length: int) -> float:
        config = self._attention
        seen, scored = length, 0.0
        if self._is_sparse(length):
            seen = min(length, config.num_selected * config.block_size)
            scored = length * length / 2 * (1 / config.kernel_stride + 1 / config.coarse_stride)
        # Query s sees s + 1 tokens, until its budget is spent.
        pairs = seen * seen / 2 + (length - seen) * seen
        # Two products per pair, each once forward and twice backward; a score is one, forward.
        per_pair = 2 * self._heads * self._head_dim
        attention = self._layers * per_pair * (6 * pairs + scored)
        return length * self._per_token + attention


def _weights_per_token(model: Any) -> int:
    """Weights that every token is multiplied with: all but the embeddings that are looked up."""
    total = sum(weight.numel() for weight in model.parameters())
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    return total if head.weight is inputs.weight else total - inputs.weight.numel()
