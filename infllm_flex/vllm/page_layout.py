"""Where a page of vLLM's cache holds keys, values, compressed keys and coarse keys.

vLLM lays out a page as ``[Hkv, page, 2 D]``: each token's key, then its value. The plugin makes
pages longer and keeps the compressed and then the coarse keys of the page behind that. Where every
key is scored in all dims, pages stay as they are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import window_entries
from infllm_flex.selection import dtype_of_compressed, dtype_of_slowest


class PageViews(NamedTuple):
    """The pages of a layer, ``[P, Hkv, entries, D]`` each; None for windows that are not kept.

    With ``score_dims`` compressed keys have so many dims instead of D, perhaps in float8.
    """

    key: Tensor
    value: Tensor
    compressed: Tensor | None
    coarse: Tensor | None


def smallest_page(config: InfLLMConfig) -> int:
    """Count the tokens of which a page is best a multiple: whole blocks and whole strides."""
    strides = [config.kernel_stride, config.block_size]
    if config.uses_coarse_keys:
        strides.append(config.coarse_stride)
    return math.lcm(*strides)


def fitting_page(config: InfLLMConfig, default: int) -> int:
    """The page size where the user names none: whole blocks, at least the default."""
    unit = smallest_page(config)
    return math.ceil(default / unit) * unit


def extra_elements(
    config: InfLLMConfig,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Count the elements by which a page grows; 0 where every key is scored in all dims.

    Args:
        config: Sparsity settings.
        page_size: Tokens of a page.
        num_kv_heads: Key/value heads of this process.
        head_dim: Elements of a head.
        dtype: Dtype of keys and values.
        device: The device of the pages.

    Raises:
        ValueError: Pages of this size do not fit the settings.
        NotImplementedError: Settings that are not served from pages.
    """
    entries = window_entries(config, page_size)
    compressed = entries.compressed * _compressed_width(config, head_dim, dtype, device)
    return num_kv_heads * (compressed + entries.coarse * head_dim)


def _compressed_width(
    config: InfLLMConfig, head_dim: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Elements of keys that a compressed key takes."""
    if not config.score_dims:
        return head_dim
    kept = dtype_of_slowest(dtype, config, device)
    return config.num_score_dims(head_dim) * kept.itemsize // dtype.itemsize


def extra_share(config: InfLLMConfig, page_size: int) -> float:
    """Share by which compressed and coarse keys of all dims enlarge a page of keys and values."""
    entries = window_entries(config, page_size)
    return (entries.compressed + entries.coarse) / (2 * page_size)


def view_pages(kv_cache: Tensor, config: InfLLMConfig) -> PageViews:
    """View a layer's pages.

    Args:
        kv_cache: vLLM's view of the layer, ``[P, Hkv, page, 2 D]``, each page contiguous and with
            room for ``extra_elements`` behind it.
        config: Sparsity settings.

    Raises:
        ValueError: The pages are laid out otherwise, or too close to each other.
    """
    P, H, page, width = kv_cache.shape
    D, kind = width // 2, (kv_cache.dtype, kv_cache.device)
    inner = (page * width, width, 1)
    room = kv_cache.stride(0) - H * page * width
    needed = extra_elements(config, page, H, D, *kind)
    if kv_cache.stride()[1:] != inner or room < needed:
        raise ValueError(
            f"pages must be contiguous [{H}, {page}, {width}] with room for {needed} elements "
            f"behind each, got strides {kv_cache.stride()}: unset VLLM_KV_CACHE_LAYOUT"
        )
    entries = window_entries(config, page)
    behind = kv_cache.storage_offset() + H * page * width

    def windows(count: int, size: int, offset: int) -> Tensor | None:
        if not count:
            return None
        strides = (kv_cache.stride(0), count * size, size, 1)
        return kv_cache.as_strided((P, H, count, size), strides, behind + offset)

    key, value = kv_cache[..., :D], kv_cache[..., D:]
    size = _compressed_width(config, D, *kind)
    compressed, kept = windows(entries.compressed, size, 0), dtype_of_compressed(key, config)
    if compressed is not None and compressed.dtype != kept:
        compressed = compressed.view(kept)
    coarse = windows(entries.coarse, D, H * entries.compressed * size)
    return PageViews(key, value, compressed, coarse)
