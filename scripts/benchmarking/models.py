"""A transformers model, patched and unpatched."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarking.settings import BenchmarkSettings, ModelSettings
from benchmarking.timing import Subject
from infllm_flex.patch import patch_model


def model_subjects(settings: BenchmarkSettings, model: ModelSettings) -> list[Subject]:
    """Prepare the unpatched and the patched model over the same input.

    Args:
        settings: The run: attention, batch, device, dtype, seed.
        model: Its size and length.

    Raises:
        RuntimeError: Patching changed the output below dense_len.
    """
    from transformers import LlamaConfig, LlamaModel

    device, dtype = torch.device(settings.run.device), getattr(torch, settings.run.dtype)
    torch.manual_seed(settings.run.seed)
    unpatched: Any = LlamaModel(
        LlamaConfig(
            vocab_size=32,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            max_position_embeddings=model.length,
        )
    )
    unpatched = unpatched.to(device, dtype).train(model.mode == "forward+backward")
    dense_len = -1 if model.sparse else model.length + 1
    config = dataclasses.replace(settings.attention, dense_len=dense_len)
    patched = patch_model(copy.deepcopy(unpatched), config)
    embeds = torch.randn(
        settings.shapes.batch, model.length, model.hidden_size, device=device, dtype=dtype
    )
    if not model.sparse:
        with torch.no_grad():
            if not torch.equal(_hidden(unpatched, embeds), _hidden(patched, embeds)):
                raise RuntimeError(
                    "below dense_len the patched model's output must equal the unpatched one's bit "
                    "for bit, and differs"
                )
    return [
        _subject(name, torch.compile(x) if model.compile else x, embeds, model)
        for name, x in (("unpatched", unpatched), ("patched", patched))
    ]


def _hidden(model: Callable[..., Any], embeds: Tensor) -> Tensor:
    return model(inputs_embeds=embeds, use_cache=False).last_hidden_state


def _subject(
    name: str, model: Callable[..., Any], embeds: Tensor, settings: ModelSettings
) -> Subject:
    if settings.mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return _hidden(model, embeds)

        return Subject("model", name, forward)
    inputs = embeds.detach().requires_grad_()
    grad_out = torch.randn_like(embeds)
    return Subject(
        "model", name, lambda: _hidden(model, inputs), lambda out: out.backward(grad_out)
    )
