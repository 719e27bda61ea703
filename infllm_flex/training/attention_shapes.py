"""The sizes of a model's attention layers, from its config: they may differ from layer to layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from infllm_flex.patch.layer_configs import config_of_layer

_WINDOWED = ("sliding", "chunked", "window")  # parts of the config's words for such layers


class AttentionShape(NamedTuple):
    """An attention layer.

    Attributes:
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Head dim of queries and keys.
        window: Tokens that each token sees at most; None if it sees all earlier ones.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None


def layer_configs(config: Any) -> list[Any]:
    """One config for each decoder layer; the model's own where its layers do not differ."""
    return [config_of_layer(config, index) for index in range(config.num_hidden_layers)]


def attention_shape(config: Any) -> AttentionShape:
    """Shape of the attention in a layer of this config, without its window."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return AttentionShape(heads, kv_heads, head_dim, None)


def attention_shapes(config: Any) -> Iterator[AttentionShape]:
    """Shapes of the layers that attend by a softmax over keys; others have no dot products."""
    configs = layer_configs(config)
    kinds = getattr(config, "layer_types", None) or [None] * len(configs)
    for own, kind in zip(configs, kinds, strict=True):
        if kind is None:  # layers that do not differ have one window or none
            yield attention_shape(own)._replace(window=getattr(own, "sliding_window", None))
        elif any(word in kind for word in _WINDOWED):
            window = getattr(own, "sliding_window", None)
            window = window or getattr(own, "attention_chunk_size", None)
            yield attention_shape(own)._replace(window=window)
        elif kind == "hybrid" or ("attention" in kind and "linear" not in kind):
            yield attention_shape(own)
