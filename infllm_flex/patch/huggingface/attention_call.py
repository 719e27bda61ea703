"""One call of the attention function, and the decision how it is served."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from infllm_flex.patch.huggingface.cache_hook import cache_layer
from infllm_flex.patch.huggingface.cached_attention import trim_mask, update_static_state
from infllm_flex.patch.huggingface.masks import LazyMask, materialize
from infllm_flex.patch.huggingface.sequence_info import NO_INFO, SequenceInfo, read_sequence_info
from infllm_flex.patch.huggingface.transformers_private import is_paged, is_static
from infllm_flex.patch.layer_state import PatchedLayer
from infllm_flex.patch.skip_reasons import OTHER_ATTENTION

# The output ``[B, Sq, Hq, D]``, and the attention weights where they are returned.
Output = tuple[Tensor, Tensor | None]


class Kind(enum.Enum):
    """How a call is served.

    Attributes:
        OVERRIDDEN: By the function that ``attend_through`` gave the layer.
        DENSE: By the layer's previous attention function.
        DECODE: Sparsely, new tokens over a cache.
        PREFILL: Sparsely, all keys are those of this call.
        PAGED: Tokens of many requests over the pages of continuous batching.
    """

    OVERRIDDEN = enum.auto()
    DENSE = enum.auto()
    DECODE = enum.auto()
    PREFILL = enum.auto()
    PAGED = enum.auto()


def is_dense_step(layer: PatchedLayer, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a call is for one token of a short sequence, as `AttentionCall.classify` would say.

    A single token has no documents to isolate. Steps of continuous batching have bounds.
    """
    is_own = layer.attend is None and layer.observe is None
    is_step = query.shape[2] == 1 and "cu_seq_lens_q" not in kwargs
    return is_own and is_step and not layer.ever_attends_sparsely(key.shape[2])


@dataclass
class AttentionCall:
    """The arguments of one call, as transformers passes them, and what belongs to them.

    Attributes:
        module: The attention layer.
        query: ``[B, Hq, Sq, D]``, after the rotary embedding.
        key: ``[B, Hkv, Skv, D]``, including what a cache held before.
        value: ``[B, Hkv, Skv, D]``.
        mask: None for plain causal, else lazy, or ``[B, 1, Sq, Skv]``.
        dropout: Probability.
        scale: Factor on the dot products; None for ``D ** -0.5``.
        previous: The attention implementation of short sequences.
        kwargs: The other keywords of the call.
        layer: The record of the layer.
        is_first: Whether the record was made for this call.
        cache: The cache that the layer was given; None without one.
        cached: The layer of the cache that holds the keys; None without a cache.
        length: Number of keys in use; a preallocated cache has more.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: LazyMask | Tensor | None
    dropout: float
    scale: float | None
    previous: str
    kwargs: dict[str, Any]
    layer: PatchedLayer
    is_first: bool
    cache: Any = None
    cached: Any = None
    length: int = 0

    def classify(self) -> Kind:
        """Decide how the call is served. No other code decides it.

        Raises:
            NotImplementedError: A cache holds keys that the layer has never seen.
        """
        layer = self.layer
        if layer.attend is not None:
            return Kind.OVERRIDDEN
        if is_paged(self.cache):
            return Kind.PAGED
        length = self.length = self.key.shape[2]
        if not layer.ever_attends_sparsely(length):
            return Kind.DENSE
        cached = self.cached = cache_layer(self.cache, self.module, self.key)
        if cached is not None and is_static(cached):
            # A static cache's state follows every call, however it is served.
            mask = self.mask = materialize(self.mask)
            config = layer.config
            length = update_static_state(cached, self.query, self.key, self.value, mask, config)
        self.length = length
        if layer.attends_densely(length):
            return Kind.DENSE
        if self.is_first and self.query.shape[2] != length:
            raise NotImplementedError(
                "sparse attention cannot serve a cache that is preallocated, or filled before, in "
                "the first call of a model that only names it as its attn_implementation: call "
                "infllm_flex.patch_model(model) first"
            )
        if cached is not None and self.query.shape[2] < length:
            return Kind.DECODE
        return Kind.PREFILL

    def drop_unused_slots(self) -> None:
        """Cut keys, values and mask of a preallocated cache to the slots in use."""
        length = self.length
        if length < self.key.shape[2]:
            self.key, self.value = self.key[:, :, :length], self.value[:, :, :length]
            self.mask = trim_mask(materialize(self.mask), self.query, length)

    def read_sequence_info(self) -> SequenceInfo:
        """Read about the call's sequences, from it or from the forward of the model around it."""
        is_causal = getattr(self.module, "is_causal", True)
        if self.query.shape[2] == 1 or not is_causal or self.layer.skip_reason in OTHER_ATTENTION:
            return NO_INFO
        return read_sequence_info(self.query, self.key, self.mask, self.kwargs, self.layer)
