"""Turn a model's attention sparse, and back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from infllm_flex.patch import huggingface
from infllm_flex.patch.settings import Settings, resolve_config

_log = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nn.Module)


def patch_model(model: _Model, config: Settings = None, **overrides: Any) -> _Model:
    """Give a causal LM InfLLM-V2 attention for sequences of ``dense_len`` tokens and more.

    In place, without a new parameter; below ``dense_len`` every output keeps its bits. Patching a
    patched model changes its settings. Other models in the process are not touched.

    Rows padded by ``attention_mask`` are dense or sparse each by its own length. Documents packed
    by ``cu_seq_lens_q``, or by ``position_ids`` that restart, never see each other at any length,
    also where transformers lets them.

    Args:
        model: A transformers model whose attention goes through its attention registry.
        config: Settings, as a config, a mapping, or the path of a YAML file. None: the model's own
            ``config.sparse_config``, else the defaults.
        overrides: Single settings by name, on top of ``config``.

    Returns:
        The same ``model``.

    Raises:
        UnsupportedModelError: No attention layer can be sparse.
        TypeError: ``model`` is no ``torch.nn.Module``, or ``config`` none of the above.
        ValueError: An unknown setting, with the nearest known one, or an impossible value.
        NotImplementedError: ``use_nope``.
    """
    require_module(model)
    layers = huggingface.attention_layers(model)
    model_configs = [getattr(module, "config", None) for module in (model, *layers.values())]
    huggingface.attach(model, resolve_config(config, overrides, model_configs))
    _log_decisions(model)
    return model


def unpatch_model(model: _Model) -> _Model:
    """Undo `patch_model`: same classes, same attributes, same outputs bit for bit.

    Args:
        model: A patched model.

    Returns:
        The same ``model``.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: ``model`` is not patched.
    """
    require_module(model)
    if not huggingface.detach(model):
        raise ValueError(f"{type(model).__name__} is not patched: there is nothing to undo")
    return model


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Attend as before patching inside the block, whatever the length. Blocks may be nested.

    Args:
        model: A patched model.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: ``model`` is not patched.
    """
    require_module(model)
    layers = list(huggingface.patched_layers(model).values())
    if not layers:
        raise ValueError(f"{type(model).__name__} is not patched: it is dense already")
    for layer in layers:
        layer.dense_depth += 1
    try:
        yield
    finally:
        for layer in layers:
            layer.dense_depth -= 1


def require_module(model: object) -> None:
    """Raise a TypeError for anything that is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _log_decisions(model: nn.Module) -> None:
    layers = huggingface.patched_layers(model).values()
    left = Counter(layer.left for layer in layers if layer.left is not None)
    sparse = [layer for layer in layers if layer.left is None]
    reasons = "; ".join(f"{count} left as they were: {reason}" for reason, count in left.items())
    _log.info(
        "%s: %d of %d attention layers sparse from %d tokens on%s",
        type(model).__name__,
        len(sparse),
        len(layers),
        max(sparse[0].config.dense_len, 1),
        f"; {reasons}" if reasons else "",
    )
