"""Caches in pages, laid out as a server lays them out, beside the same rows in one piece."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from infllm_flex import CompressedKeys, InfLLMConfig
from infllm_flex.decoding import PagedBatch, PagedCache
from infllm_flex.vllm.page_layout import extra_elements, view_pages
from tests.inputs import on_default_device

_NO_PAGE = 1 << 30  # reading it is an error, or ends the process


class Rows(NamedTuple):
    """The same rows in pages and in one piece.

    Attributes:
        cache: The pages, in any order. All memory that no row uses is NaN.
        block_table: int32 ``[B, max_pages]``, with pages that do not exist behind each row's last.
        lengths: Tokens of each row.
        k: The same keys, ``[B, Hkv, S, D]``, NaN beyond each row.
        v: The same values.
    """

    cache: PagedCache
    block_table: Tensor
    lengths: list[int]
    k: Tensor
    v: Tensor

    @property
    def seq_lens(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32)

    def batch(self, counts: list[int], lengths: list[int] | None = None) -> PagedBatch:
        """Make a batch of the last ``counts`` tokens of rows that are ``lengths`` long so far."""
        lengths = self.lengths if lengths is None else lengths
        start = query_start(counts)
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        return PagedBatch.of_rows(self.block_table, seq_lens, start, lengths, start.tolist())

    def unpaged(self, config: InfLLMConfig) -> CompressedKeys:
        """Compress the keys of the rows in one piece."""
        state = CompressedKeys(config, self.k)
        state.append(self.k, self.k.shape[2], end=self.seq_lens.long())
        return state


def query_start(counts: list[int]) -> Tensor:
    """Where the queries of each row start, int32 ``[B + 1]``."""
    return torch.tensor([0, *counts]).cumsum(0).int()


def draw_rows(
    config: InfLLMConfig,
    lengths: list[int],
    page_size: int,
    *,
    Hkv: int = 2,
    D: int = 16,
    dtype: torch.dtype = torch.float32,
    shared: int = 0,
    spare: int = 2,
    whole_numbers: bool = False,
    seed: int = 0,
) -> Rows:
    """Draw keys and values; their windows are not yet written.

    Args:
        config: Sparsity settings.
        lengths: Tokens of each row; 0 for an empty row.
        page_size: Tokens of a page.
        Hkv: KV heads.
        D: Head dim.
        dtype: Dtype of the keys.
        shared: Whole pages that all rows of at least that length have in common.
        spare: Pages of the block table beyond the longest row.
        whole_numbers: Draw small whole numbers, whose dot products are exact.
        seed: Seed of the numbers and of the order of the pages.
    """
    random = torch.Generator().manual_seed(seed)
    max_pages = -(-max(lengths) // page_size) + spare
    shape = (len(lengths), Hkv, max_pages * page_size, D)
    draw = functools.partial(torch.randint, -3, 4) if whole_numbers else torch.randn
    drawn = (draw(shape, generator=random, device="cpu") for _ in range(2))
    k, v = (on_default_device(x).to(dtype) for x in drawn)
    own = torch.randperm(len(lengths) * max_pages + 3, generator=random, device="cpu").tolist()
    prefix = [own.pop() for _ in range(shared)]
    cache = allocate_pages(config, len(lengths) * max_pages + 3, page_size, Hkv, D, dtype)
    table = torch.full((len(lengths), max_pages), _NO_PAGE, dtype=torch.int32)
    for row, length in enumerate(lengths):
        if length >= shared * page_size:
            for x in (k, v):
                x[row, :, : shared * page_size] = x[0, :, : shared * page_size]
        for x in (k, v):
            x[row, :, length:] = torch.nan
        for i in range(-(-length // page_size)):
            is_shared = i < shared and length >= shared * page_size
            page = prefix[i] if is_shared else own.pop()
            table[row, i] = page
            at = slice(i * page_size, (i + 1) * page_size)
            cache.key[page], cache.value[page] = k[row, :, at], v[row, :, at]
    return Rows(cache, table, lengths, k, v)


def allocate_pages(
    config: InfLLMConfig, count: int, page_size: int, Hkv: int, D: int, dtype: torch.dtype
) -> PagedCache:
    """Allocate pages of NaN as vLLM does: key beside value, then windows in the page's padding."""
    tokens = Hkv * page_size * 2 * D
    room = extra_elements(config, page_size, Hkv, D, dtype, torch.get_default_device())
    memory = torch.full((count, tokens + room + 24), torch.nan, dtype=dtype)
    kv_cache = memory[:, :tokens].unflatten(1, (Hkv, page_size, 2 * D))
    return PagedCache(config, *view_pages(kv_cache, config))
