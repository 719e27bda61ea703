"""Turn a model's attention sparse, and back."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from infllm_flex.patch import discovery
from infllm_flex.patch.dense_context import dense_context
from infllm_flex.patch.discovery import AttentionModule
from infllm_flex.patch.example_run import Example, record_example
from infllm_flex.patch.head_groups import Heads, check_kv_heads, read_heads
from infllm_flex.patch.layer_state import get_layer
from infllm_flex.patch.module_names import Names, resolve_modules
from infllm_flex.patch.report import describe_switch
from infllm_flex.patch.rotary_layout import check_score_dims, suits_score_dims
from infllm_flex.patch.settings import Settings, pays_from, resolve_config
from infllm_flex.patch.unsupported import (
    reject_scripted,
    reject_unsupported,
    require_module,
    require_not_traced,
)

_log = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nn.Module)


def patch_model(
    model: _Model,
    config: Settings = None,
    *,
    attention_modules: Names | None = None,
    num_key_value_heads: int | None = None,
    example_inputs: Example | None = None,
    **overrides: Any,
) -> _Model:
    """Give a causal LM InfLLM-V2 attention for sequences of ``dense_len`` tokens and more.

    The model changes in place and gets no new parameter. Below ``dense_len`` every output keeps its
    bits. Patching a patched model changes its settings. Other models in the process do not change.

    Each row padded by ``attention_mask`` is dense or sparse by its own length. Documents packed by
    ``cu_seq_lens_q``, or by ``position_ids`` that go back, never see each other at any length, even
    where transformers would let them.

    Args:
        model: A causal LM that attends through transformers' attention registry, through the
            attention of torchtune, litgpt, torchtitan or x-transformers, or by calls of
            ``torch.nn.functional.scaled_dot_product_attention`` with ``is_causal=True`` or a causal
            mask.
        config: All settings, as a config, a mapping, or the path of a YAML file; what a mapping or
            file does not name has the default of InfLLMConfig. With None, the model's own
            ``config.sparse_config`` is used. A model without one scores every key by pooled
            queries, in 32 head dims if it is known to rotate halves, and in float8 if it is on a
            GPU that multiplies float8. It is sparse from 32768 tokens on, with one query head to a
            key/value head from 131072 on. Where its head dim is above 128 it scores means of 8
            keys and is sparse from 262144 tokens on (docs/choosing-settings.md says why).
        attention_modules: The attention layers, instead of a search for them: names as in
            ``named_modules``, in which ``*`` stands for anything between dots, classes, or modules.
        num_key_value_heads: Key/value heads of a model that expands them before attention, if
            neither its layers nor its config say how many there are. The queries of one key/value
            head select blocks together.
        example_inputs: Inputs of the model, as one tensor, a sequence or a mapping of keywords. The
            model runs once without gradients, and the modules that attend become its attention
            layers. Without example inputs the code of the modules decides; where it is misleading,
            the first forward raises an UnsupportedModelError.
        overrides: Single settings by name, which take precedence over ``config``. If one of them
            changes what is scored, such as ``kernel_size``, and the model has no
            ``sparse_config``, all others but ``dense_len`` are the defaults of InfLLMConfig.

    Returns:
        The same ``model``.

    Raises:
        UnsupportedModelError: No attention layer can be sparse, or a named one cannot.
        TypeError: ``model`` is no ``torch.nn.Module``, or ``config`` has another type.
        ValueError: A setting is unknown (the error shows the nearest known one) or has an invalid
            value, or no module has a name in ``attention_modules``. ``score_dims`` does not fit the
            rotary embedding.
        RuntimeError: ``model`` is being traced.
        NotImplementedError: ``use_nope``.
    """
    require_module(model)
    require_not_traced("patch_model")
    reject_scripted(model)
    check_kv_heads(num_key_value_heads)
    named = None if attention_modules is None else resolve_modules(model, attention_modules)
    seen = None if example_inputs is None else _record_densely(model, example_inputs)
    layers = discovery.find_layers(model, named, seen)
    reject_unsupported(model, layers, named)
    model_configs = [
        getattr(m, "config", None) for m in (model, *(f.module for f in layers.values()))
    ]
    sparse = discovery.sparse_modules(layers)
    heads = _heads_of(model, sparse, num_key_value_heads)
    suits = functools.partial(suits_score_dims, model, sparse)
    device = _device_of(model)
    resolved = resolve_config(config, overrides, model_configs, device, heads, suits)
    check_score_dims(model, sparse, resolved.config)
    discovery.attach(model, layers, resolved.config, num_key_value_heads)
    for layer in discovery.patched_layers(model).values():
        layer.origin = resolved.origin
    _log_decisions(model, layers)
    _log_how_to_save(model)
    _log_where_it_pays(device, heads, resolved.config.dense_len)
    return model


def _heads_of(model: nn.Module, layers: Mapping[str, nn.Module], kv_heads: int | None) -> Heads:
    """The heads of the first layer that says what its head dim is, else of the first."""
    all_heads = [read_heads(module, model, kv_heads) for module in layers.values()]
    return next((heads for heads in all_heads if heads.head_dim is not None), all_heads[0])


def _device_of(model: nn.Module) -> torch.device | None:
    return next((weight.device for weight in model.parameters()), None)


def _record_densely(model: nn.Module, example: Example) -> dict[nn.Module, str | None]:
    with dense_context(discovery.patched_layers(model).values()):
        return record_example(model, example)


def unpatch_model(model: _Model) -> _Model:
    """Undo `patch_model`: same classes, same attributes, same outputs bit for bit.

    Args:
        model: A patched model.

    Returns:
        The same ``model``.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: ``model`` is not patched, or ``fully_shard`` replaced the class of a
            patched layer.
        RuntimeError: ``model`` is being traced.
    """
    require_module(model)
    require_not_traced("unpatch_model")
    if not discovery.detach(model):
        raise ValueError(f"{type(model).__name__} is not patched: there is nothing to undo")
    return model


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Attend as before patching inside the block, at any length. Blocks may be nested.

    A block holds for the thread that opened it. Layers that activation checkpointing recomputes in
    a backward pass attend as they did in the forward, in any thread and inside or outside a block.
    If a checkpoint contains compiled layers, keep the backward pass in the block of the forward.

    Args:
        model: A patched model.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: ``model`` is not patched.
    """
    require_module(model)
    layers = list(discovery.patched_layers(model).values())
    if not layers:
        raise ValueError(f"{type(model).__name__} is not patched: it is dense already")
    with dense_context(layers):
        yield


def _log_decisions(model: nn.Module, layers: Mapping[str, AttentionModule]) -> None:
    skipped = Counter(
        found.skip_reason for found in layers.values() if found.skip_reason is not None
    )
    sparse = next(found.module for found in layers.values() if found.skip_reason is None)
    reasons = "; ".join(f"{count} left as they were: {reason}" for reason, count in skipped.items())
    layer = get_layer(sparse)
    assert layer is not None
    _log.info(
        "%s: %d of %d attention layers sparse from %s (settings: %s)%s",
        type(model).__name__,
        len(layers) - sum(skipped.values()),
        len(layers),
        describe_switch(layer.config),
        layer.origin,
        f"; {reasons}" if reasons else "",
    )


def _log_how_to_save(model: nn.Module) -> None:
    """Log how to save a model that was read from a GGUF file, which transformers refuses to do."""
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(quantization, "quant_method", None) == "gguf":
        _log.info(
            "read from a GGUF file, which save_pretrained refuses; its weights are plain ones: set "
            "model.hf_quantizer = None and delete model.config.quantization_config to save it"
        )


def _log_where_it_pays(device: torch.device | None, heads: Heads, dense_len: int) -> None:
    """Log from which length sparse attention is faster than dense, if ``dense_len`` is less."""
    if device is None or device.type not in ("cpu", "cuda"):
        return
    where, length = ("a CPU", 16384) if device.type == "cpu" else ("a GPU", pays_from(heads))
    if dense_len < length:
        _log.info(
            "on %s sparse attention is measured to be faster from %d tokens on", where, length
        )
