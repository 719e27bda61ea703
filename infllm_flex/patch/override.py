"""Replace the attention of every patched layer (context parallelism uses this)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from infllm_flex.patch import huggingface
from infllm_flex.patch.layer_state import LayerAttend
from infllm_flex.patch.unsupported import require_module


@contextmanager
def attend_through(model: nn.Module, attend: LayerAttend) -> Iterator[None]:
    """Replace the attention of every layer by another function inside the block, at any length.

    Context parallelism needs this because no process holds a whole sequence; other selections of
    blocks can be tried with it. The model's masks and position ids are not looked at.

    Args:
        model: A patched transformers model.
        attend: Maps a layer's number, from 0, to its function. The function takes queries, keys and
            values after the rotary embedding, and the factor on the dot products (None for the
            default one). It returns the output, as `infllm_attention` does.

    Raises:
        ValueError: ``model`` is not patched, or one of its layers cannot be sparse.
    """
    require_module(model)
    layers = huggingface.patched_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} is not patched through transformers' registry: there is no "
            "layer whose attention could be replaced"
        )
    for name, module in huggingface.attention_layers(model).items():
        if (reason := huggingface.find_skip_reason(module)) is not None:
            raise ValueError(f"the attention of {name} cannot be replaced: {reason}")
    for number, layer in enumerate(layers.values()):
        layer.attend = attend(number)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.attend = None
