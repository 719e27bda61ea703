"""Attention in other hands, for sequences that no process holds whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from infllm_flex.patch import huggingface
from infllm_flex.patch.layer_state import LayerAttend
from infllm_flex.patch.unsupported import require_module


@contextmanager
def attend_through(model: nn.Module, attend: LayerAttend) -> Iterator[None]:
    """Hand the attention of every layer to another function inside the block, dense or sparse.

    For callers who hold sequences in another way than whole, as context parallelism does, or who
    choose blocks in another way. What the model makes of masks and positions is not looked at.

    Args:
        model: A patched transformers model.
        attend: The function of each layer, by the layer's number from 0. It takes queries, keys
            and values after the rotary embedding and the factor on their products, None for the
            usual one, and returns the output, as `infllm_attention` does.

    Raises:
        ValueError: ``model`` is not patched, or a layer was left as it was.
    """
    require_module(model)
    layers = huggingface.patched_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} is not patched through transformers' registry: no layer to "
            "hand over"
        )
    for name, module in huggingface.attention_layers(model).items():
        if (left := huggingface.why_left(module)) is not None:
            raise ValueError(f"{name} cannot attend otherwise than as it was made: {left}")
    for number, layer in enumerate(layers.values()):
        layer.attend = attend(number)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.attend = None
