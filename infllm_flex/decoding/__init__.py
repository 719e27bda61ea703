"""Decoding over a key/value cache: the state kept beside it, and sparse attention over it."""

from infllm_flex.decoding.attention import decode_attention, select_cached
from infllm_flex.decoding.compressed_keys import CompressedKeys

__all__ = ["CompressedKeys", "decode_attention", "select_cached"]
