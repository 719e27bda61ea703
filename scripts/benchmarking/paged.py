"""Attention over a key/value cache in pages, for comparison with a cache in one piece."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarking.inputs import QKV
from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import PagedBatch, PagedCache, allocate_windows, paged_attention
from infllm_flex_ops.sizes import ceil_div


class Pages(NamedTuple):
    """The last tokens of every row, and keys and values in pages.

    Attributes:
        query: ``[B * n, Hq, D]``, the n queries of a row side by side.
        both: Keys and values side by side, ``[P, Hkv, page_size, 2 * D]``, in random order.
        table: The pages of each row in order, int32 ``[B, pages of a row]``.
        lengths: Tokens of each row, int32 ``[B]``, all the same.
        length: That number on the host.
    """

    query: Tensor
    both: Tensor
    table: Tensor
    lengths: Tensor
    length: int

    @property
    def key(self) -> Tensor:
        """Keys, ``[P, Hkv, page_size, D]``."""
        return self.both[..., : self.query.shape[-1]]

    @property
    def value(self) -> Tensor:
        """Values, ``[P, Hkv, page_size, D]``."""
        return self.both[..., self.query.shape[-1] :]

    @property
    def num_queries(self) -> int:
        """n, the queries of a row."""
        return len(self.query) // len(self.table)


class PagedAttention:
    """The last tokens of every row attend to keys and values that lie in pages in random order.

    Args:
        qkv: Queries, of which a row has one or many, keys and values.
        config: Sparsity settings.
        page_size: Tokens of a page.

    Attributes:
        pages: The tensors, for other attentions over the same pages.
    """

    def __init__(self, qkv: QKV, config: InfLLMConfig, page_size: int) -> None:
        B, _, n, _ = qkv.query.shape
        S, device = qkv.key.shape[2], qkv.key.device
        self.pages = _fill_pages(qkv, page_size)
        self._cache = _make_cache(self.pages, config)
        table, lengths = self.pages.table, self.pages.lengths
        start = torch.arange(B + 1, dtype=torch.int32, device=device) * n
        bounds = [row * n for row in range(B + 1)]
        whole = torch.arange(B + 1, dtype=torch.int32, device=device) * S
        self._cache.append(PagedBatch.of_steps(table, lengths, whole, S))
        self._batch = PagedBatch.of_rows(table, lengths, start, [S] * B, bounds)

    @torch.no_grad()
    def run(self) -> Tensor:
        """Append the windows of the queries' tokens and attend: ``[B * n, Hq, D]``."""
        self._cache.append(self._batch)
        return paged_attention(self.pages.query, self._cache, self._batch)


def _fill_pages(qkv: QKV, page_size: int) -> Pages:
    """Copy keys and values into pages in random order, side by side as servers keep them."""
    (B, Hkv, S, D), device = qkv.key.shape, qkv.key.device
    pages_per_row = ceil_div(S, page_size)
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(B * pages_per_row, generator=random).to(device).view(B, -1)
    pages = qkv.key.new_empty(order.numel(), Hkv, page_size, 2 * D)
    # Row by row: a copy of all rows may not fit in memory.
    for own, key, value in zip(order, qkv.key, qkv.value, strict=True):
        both = F.pad(torch.cat([key, value], 2), (0, 0, 0, -S % page_size))
        pages[own] = both.unflatten(1, (-1, page_size)).transpose(0, 1)
    query = qkv.query.transpose(1, 2).flatten(0, 1).contiguous()
    lengths = torch.full((B,), S, dtype=torch.int32, device=device)
    return Pages(query, pages, order.int(), lengths, S)


def _make_cache(pages: Pages, config: InfLLMConfig) -> PagedCache:
    """Put the pages beside empty windows."""
    return PagedCache(config, pages.key, pages.value, *allocate_windows(config, pages.key))
