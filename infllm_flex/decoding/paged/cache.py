"""The pages of one layer: keys, values, and averages of windows of keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import infllm_flex_ops
from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding.paged.batch import PagedBatch
from infllm_flex.selection import selection_rule
from infllm_flex_ops.pages import entries_per_page


class WindowEntries(NamedTuple):
    """Room for windows in a page: entries of ``[Hkv, D]`` in the dtype of the keys.

    Attributes:
        compressed: Compressed keys.
        coarse: Coarse keys; 0 where the settings need none.
    """

    compressed: int
    coarse: int


def window_entries(config: InfLLMConfig, page_size: int) -> WindowEntries:
    """Count the windows that a page of ``page_size`` tokens has to hold beside its keys.

    Raises:
        ValueError: Pages of this size cannot hold the blocks or windows of these settings.
        NotImplementedError: Settings that are not served from pages.
    """
    _check_config(config, page_size)
    coarse = entries_per_page(page_size, config.coarse_stride) if config.lse == "coarse" else 0
    return WindowEntries(page_size // config.kernel_stride, coarse)


class PagedCache:
    """The pages of one layer: views of keys, values and averages of windows of keys.

    The views may have any strides, as long as the elements of a head lie side by side. Windows lie
    in the page of their last key, as entry ``last % page // step``. They are as valid as the page:
    a page that is shared, copied or kept for another request takes its windows along.

    Args:
        config: Sparsity settings. A query is dense iff its row holds fewer than ``dense_len``
            tokens up to it, its own included.
        key: ``[P, Hkv, page, D]``.
        value: ``[P, Hkv, page, D]``.
        compressed: ``[P, Hkv, window_entries(config, page).compressed, D]``.
        coarse: ``[P, Hkv, window_entries(config, page).coarse, D]``; None where that is 0.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the page size does not fit the
            settings.
        NotImplementedError: Settings that are not served from pages: ``pool_queries`` and
            ``use_nope``.
    """

    def __init__(
        self,
        config: InfLLMConfig,
        key: Tensor,
        value: Tensor,
        compressed: Tensor,
        coarse: Tensor | None = None,
    ) -> None:
        if key.dim() != 4:
            raise ValueError(f"key must be [P, Hkv, page, D], got shape {tuple(key.shape)}")
        entries = window_entries(config, key.shape[2])
        _check_pages("value", value, key, key.shape[2])
        _check_pages("compressed", compressed, key, entries.compressed)
        if (coarse is None) != (entries.coarse == 0):
            raise ValueError(
                f"coarse must hold {entries.coarse} entries per page for lse = {config.lse!r}, "
                f"got {'none' if coarse is None else coarse.shape[2]}"
            )
        if coarse is not None:
            _check_pages("coarse", coarse, key, entries.coarse)
        self.config = config
        self.key, self.value = key, value
        self.compressed, self.coarse = compressed, coarse
        self.rule = selection_rule(config)

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.key.shape[2]

    @torch.no_grad()
    def append(self, batch: PagedBatch) -> None:
        """Average the windows that the queries' tokens complete; their keys are in the pages."""
        infllm_flex_ops.append_paged_windows(
            self.key,
            self.compressed,
            self.coarse,
            batch.block_table,
            batch.seq_lens,
            batch.query_start,
            batch.max_new,
            *self.rule.windows,
            *self.rule.coarse_windows,
        )


def _check_config(config: InfLLMConfig, page_size: int) -> None:
    for name in ("pool_queries", "use_nope"):
        if getattr(config, name):
            raise NotImplementedError(
                f"{name} is not served from pages: set {name} to false, or decode with "
                "CompressedKeys over a contiguous cache"
            )
    for name in ("kernel_stride", "coarse_stride", "block_size"):
        size = getattr(config, name)
        if name == "coarse_stride" and config.lse != "coarse":
            continue
        fits = page_size % size == 0 or (name != "kernel_stride" and size % page_size == 0)
        if not fits:
            may = "a multiple" if name == "kernel_stride" else "a multiple or a divisor"
            raise ValueError(
                f"a page must hold {may} of {name} = {size} tokens, got {page_size}: "
                f"choose another page size"
            )


def _check_pages(name: str, pages: Tensor, key: Tensor, entries: int) -> None:
    expected = (*key.shape[:2], entries, key.shape[3])
    if pages.shape != expected:
        raise ValueError(f"{name} must be {list(expected)}, got {list(pages.shape)}")
    if (pages.dtype, pages.device) != (key.dtype, key.device):
        raise ValueError(
            f"{name} must be {key.dtype} on {key.device} as key is, "
            f"got {pages.dtype} on {pages.device}"
        )
    if pages.stride(-1) != 1:
        raise ValueError(
            f"the elements of {name}'s heads must lie side by side, got stride {pages.stride(-1)}"
        )
