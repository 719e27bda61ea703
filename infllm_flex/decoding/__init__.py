"""Decoding over a key/value cache: the state kept beside it, and sparse attention over it."""

from infllm_flex.decoding.attention import decode_attention, select_cached
from infllm_flex.decoding.compressed_keys import CompressedKeys
from infllm_flex.decoding.paged import (
    FEW_QUERIES,
    PagedBatch,
    PagedCache,
    allocate_windows,
    paged_attention,
    window_entries,
)

__all__ = [
    "FEW_QUERIES",
    "CompressedKeys",
    "PagedBatch",
    "PagedCache",
    "allocate_windows",
    "decode_attention",
    "paged_attention",
    "select_cached",
    "window_entries",
]
