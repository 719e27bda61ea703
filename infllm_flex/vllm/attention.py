"""The attention of a layer in vLLM: keys into pages, windows into pages, queries to blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from infllm_flex.decoding import PagedBatch, PagedCache, paged_attention
from infllm_flex.vllm.page_layout import view_pages
from infllm_flex.vllm.refusals import LayerFacts, check_layer
from infllm_flex.vllm.vllm_config import settings_of


class InfLLMAttention(AttentionImpl):
    """InfLLM-V2 over vLLM's pages; the arguments are vLLM's."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        sinks = others.pop("sinks", None)
        check_layer(
            LayerFacts(
                alibi=alibi_slopes is not None,
                soft_cap=bool(logits_soft_cap),
                sinks=sinks is not None,
                window=sliding_window is not None,
                kind=AttentionType(attn_type).value,
                shares_cache=kv_sharing_target_layer_name is not None,
                others=tuple(name for name, value in others.items() if value is not None),
            )
        )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.config = settings_of(get_current_vllm_config())
        self._pages: tuple[Tensor, PagedCache] | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Write keys and values into their slots.

        Args:
            layer: The layer.
            key: ``[T, Hkv, D]``.
            value: ``[T, Hkv, D]``.
            kv_cache: ``[P, Hkv, page, 2 D]``.
            slot_mapping: Slots ``[T']``; what is beyond the shorter one of T and T' is padding, as
                tokens with a negative slot are.
        """
        num = min(key.shape[0], slot_mapping.shape[0])
        # Padding goes to page 0, which vLLM gives to no request: finding it would wait for a GPU.
        slots = slot_mapping[:num].long().clamp(min=0)
        page, offset = slots // kv_cache.shape[2], slots % kv_cache.shape[2]
        D = key.shape[-1]
        kv_cache[page, :, offset, :D] = key[:num]
        kv_cache[page, :, offset, D:] = value[:num]

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Compress the windows that the step's keys complete, then attend.

        Args:
            layer: The layer.
            query: ``[T, Hq, D]``.
            key: ``[T, Hkv, D]``, which is in the pages already.
            value: ``[T, Hkv, D]``, likewise.
            kv_cache: ``[P, Hkv, page, 2 D]``.
            attn_metadata: A `StepMetadata`; None while vLLM measures memory.
            output: ``[T, Hq, D]``, written in place.
            output_scale: Not used.
            output_block_scale: Not used.
        """
        if attn_metadata is None:
            return output.fill_(0)
        batch: PagedBatch = attn_metadata.batch
        num = attn_metadata.num_tokens
        cache = self._cache(kv_cache)
        cache.append(batch)
        output[:num] = paged_attention(query[:num], cache, batch, scale=self.scale)
        return output

    def _cache(self, kv_cache: Tensor) -> PagedCache:
        """Views of the layer's pages, made once per cache."""
        if self._pages is None or self._pages[0] is not kv_cache:
            cache = PagedCache(self.config, *view_pages(kv_cache, self.config))
            self._pages = kv_cache, cache
        return self._pages[1]
