"""Decoding over a key/value cache: the state beside it, and attention that reads little of it."""

from infllm_flex.decoding.attention import decode_attention, select_cached
from infllm_flex.decoding.compressed_keys import CompressedKeys

__all__ = ["CompressedKeys", "decode_attention", "select_cached"]
