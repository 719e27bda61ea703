"""Attention over a key/value cache in pages, as servers keep it: prompts, chunks and decoding."""

from infllm_flex.decoding.paged.attention import paged_attention
from infllm_flex.decoding.paged.batch import FEW_QUERIES, PagedBatch
from infllm_flex.decoding.paged.cache import PagedCache, allocate_windows, window_entries

__all__ = [
    "FEW_QUERIES",
    "PagedBatch",
    "PagedCache",
    "allocate_windows",
    "paged_attention",
    "window_entries",
]
