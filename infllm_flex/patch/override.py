"""Replace the attention of every patched layer, or look at its inputs and its output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from infllm_flex.patch import huggingface
from infllm_flex.patch.layer_state import LayerAttend, LayerObserve, PatchedLayer, own_layer
from infllm_flex.patch.unsupported import require_module


@contextmanager
def attend_through(
    model: nn.Module, attend: LayerAttend, *, leave_others: bool = False
) -> Iterator[None]:
    """Replace the attention of every layer by another function inside the block, at any length.

    Context parallelism needs this because no process holds a whole sequence; other selections of
    blocks can be tried with it. The model's masks and position ids are not looked at.

    Args:
        model: A patched transformers model.
        attend: Maps a layer's number, from 0, to its function. The function takes queries, keys and
            values after the rotary embedding, and the factor on the dot products (None for the
            default one). It returns the output, as `infllm_attention` does.
        leave_others: Leave layers that cannot be sparse, such as those with a sliding window, as
            they are.

    Raises:
        ValueError: ``model`` is not patched, or one of its layers cannot be sparse.
    """
    layers = _registered_layers(model)
    for name, module in huggingface.attention_layers(model).items():
        layer = layers.get(name) or own_layer(module)
        reason = huggingface.find_skip_reason(module) if layer is None else layer.skip_reason
        if reason is not None and not leave_others:
            raise ValueError(f"the attention of {name} cannot be replaced: {reason}")
    for number, layer in enumerate(layers.values()):
        if layer.skip_reason is None:
            layer.attend = attend(number)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.attend = None


@contextmanager
def observe_attention(model: nn.Module, observe: LayerObserve) -> Iterator[None]:
    """Show the attention of every layer that can be sparse to a function inside the block.

    Args:
        model: A patched transformers model.
        observe: Maps a layer's number, from 0, to its function. The function takes the output
            ``[B, Sq, Hq, D]``, queries and keys after the rotary embedding, and the factor on the
            dot products (None for the default one). The model goes on with what it returns.

    Raises:
        ValueError: ``model`` is not patched.
    """
    layers = [x for x in _registered_layers(model).values() if x.skip_reason is None]
    for number, layer in enumerate(layers):
        layer.observe = observe(number)
    try:
        yield
    finally:
        for layer in layers:
            layer.observe = None


def _registered_layers(model: nn.Module) -> dict[str, PatchedLayer]:
    require_module(model)
    layers = huggingface.patched_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} is not patched through transformers' registry: there is no "
            "layer whose attention could be replaced or observed"
        )
    return layers
