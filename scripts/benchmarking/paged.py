"""Attention over a key/value cache in pages, beside the same over one in one piece."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarking.inputs import QKV
from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding import PagedBatch, PagedCache, paged_attention, window_entries
from infllm_flex_ops.sizes import ceil_div


class PagedAttention:
    """The last tokens of every row attend to keys and values that lie in pages in random order.

    Args:
        qkv: Queries, of which a row has one or many, keys and values.
        config: Sparsity settings.
        page_size: Tokens of a page.
    """

    def __init__(self, qkv: QKV, config: InfLLMConfig, page_size: int) -> None:
        B, _, n, _ = qkv.query.shape
        S, device = qkv.key.shape[2], qkv.key.device
        self._query = qkv.query.transpose(1, 2).flatten(0, 1).contiguous()
        pages_per_row = ceil_div(S, page_size)
        random = torch.Generator().manual_seed(0)
        order = torch.randperm(B * pages_per_row, generator=random).to(device)
        self._cache = _fill_pages(qkv, config, page_size, order)
        table = order.int().view(B, pages_per_row)
        lengths = torch.full((B,), S, dtype=torch.int32, device=device)
        start = torch.arange(B + 1, dtype=torch.int32, device=device) * n
        bounds = [row * n for row in range(B + 1)]
        whole = torch.arange(B + 1, dtype=torch.int32, device=device) * S
        self._cache.append(PagedBatch.of_steps(table, lengths, whole, S))
        self._batch = PagedBatch.of_rows(table, lengths, start, [S] * B, bounds)

    @torch.no_grad()
    def run(self) -> Tensor:
        """Append the windows of the queries' tokens and attend: ``[B * n, Hq, D]``."""
        self._cache.append(self._batch)
        return paged_attention(self._query, self._cache, self._batch)


def _fill_pages(qkv: QKV, config: InfLLMConfig, page_size: int, order: Tensor) -> PagedCache:
    """Copy keys and values into pages, side by side as servers keep them, in the given order."""
    _, Hkv, S, D = qkv.key.shape
    entries = window_entries(config, page_size)
    both = torch.cat([qkv.key, qkv.value], 3)
    both = F.pad(both, (0, 0, 0, -S % page_size))
    pages = torch.empty_like(both).view(len(order), Hkv, page_size, 2 * D)
    pages[order] = both.unflatten(2, (-1, page_size)).transpose(1, 2).flatten(0, 1)
    compressed, coarse = (pages.new_zeros(len(order), Hkv, count, D) for count in entries)
    return PagedCache(
        config, pages[..., :D], pages[..., D:], compressed, coarse if entries.coarse else None
    )
