"""The pages of one layer: keys, values, and averages of windows of keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import infllm_flex_ops
from infllm_flex.config import InfLLMConfig
from infllm_flex.decoding.paged.batch import PagedBatch
from infllm_flex.selection import dtype_of_compressed, selection_rule
from infllm_flex.validation import check_head_dim_and_dtype
from infllm_flex_ops.pages import entries_per_page


class WindowEntries(NamedTuple):
    """Room for windows in a page: entries of ``[Hkv, D]`` in the dtype of the keys.

    Either is 0 where the settings need none.

    Attributes:
        compressed: Compressed keys.
        coarse: Coarse keys.
    """

    compressed: int
    coarse: int


def window_entries(config: InfLLMConfig, page_size: int) -> WindowEntries:
    """Count the windows that a page of ``page_size`` tokens has to hold beside its keys.

    Raises:
        ValueError: Pages of this size cannot hold the blocks or windows of these settings.
        NotImplementedError: Settings that are not served from pages.
    """
    if page_size < 1:
        raise ValueError(f"page_size must be 1 or more, got {page_size}")
    _check_config(config, page_size)
    compressed = 0 if config.scores_keys else page_size // config.kernel_stride
    uses_coarse = config.uses_coarse_keys
    coarse = entries_per_page(page_size, config.coarse_stride) if uses_coarse else 0
    return WindowEntries(compressed, coarse)


def allocate_windows(config: InfLLMConfig, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Allocate the compressed and coarse keys beside pages of keys.

    Args:
        config: Sparsity settings.
        key: ``[P, Hkv, page, D]``.

    Returns:
        ``compressed`` and ``coarse`` of `PagedCache`, zero; None for those that are not kept.
    """
    entries = window_entries(config, key.shape[2])
    P, H, _, D = key.shape
    dims, dtype = _kind_of_compressed(config, key)
    compressed = key.new_zeros((P, H, entries.compressed, dims), dtype=dtype)
    coarse = key.new_zeros(P, H, entries.coarse, D)
    return compressed if entries.compressed else None, coarse if entries.coarse else None


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
        compressed: ``[P, Hkv, window_entries(config, page).compressed, D]``; None where that is 0.
            With ``score_dims`` these many instead of D, perhaps in float8: `allocate_windows` makes
            them.
        coarse: ``[P, Hkv, window_entries(config, page).coarse, D]``; None where that is 0.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the page size does not fit the
            settings.
        NotImplementedError: ``use_nope``, since pages hold keys after the rotary embedding.
    """

    def __init__(
        self,
        config: InfLLMConfig,
        key: Tensor,
        value: Tensor,
        compressed: Tensor | None = None,
        coarse: Tensor | None = None,
    ) -> None:
        if key.dim() != 4 or 0 in key.shape:
            raise ValueError(f"key must be [P, Hkv, page, D], got shape {tuple(key.shape)}")
        check_head_dim_and_dtype("key", key)
        entries = window_entries(config, key.shape[2])
        kind = _Kind(key.shape[3], key.dtype)
        _check_pages("key", key, key, key.shape[2], kind)
        _check_pages("value", value, key, key.shape[2], kind)
        of_compressed = _kind_of_compressed(config, key)
        _check_windows("compressed", compressed, key, entries.compressed, of_compressed)
        _check_windows("coarse", coarse, key, entries.coarse, kind)
        self.config = config
        self.key, self.value = key, value
        self.compressed, self.coarse = compressed, coarse
        self.rule = selection_rule(config)

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.key.shape[2]

    @property
    def scored(self) -> Tensor:
        """Pages that score blocks: compressed keys, or the keys where none are kept."""
        return self.key if self.compressed is None else self.compressed

    @torch.no_grad()
    def append(self, batch: PagedBatch) -> None:
        """Average the windows that the queries' tokens complete; their keys are in the pages."""
        if self.compressed is None:
            return
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
    if config.use_nope:
        raise NotImplementedError(
            "use_nope is not served from pages, which hold keys after the rotary embedding: set "
            "use_nope to false"
        )
    for name in ("kernel_stride", "coarse_stride", "block_size"):
        size = getattr(config, name)
        if name == "coarse_stride" and not config.uses_coarse_keys:
            continue
        fits = page_size % size == 0 or (name != "kernel_stride" and size % page_size == 0)
        if not fits:
            may = "a multiple" if name == "kernel_stride" else "a multiple or a divisor"
            raise ValueError(
                f"a page must hold {may} of {name} = {size} tokens, got {page_size}: "
                f"choose another page size"
            )


class _Kind(NamedTuple):
    """Dims of an entry's heads, and their dtype."""

    dims: int
    dtype: torch.dtype


def _kind_of_compressed(config: InfLLMConfig, key: Tensor) -> _Kind:
    return _Kind(config.num_score_dims(key.shape[3]), dtype_of_compressed(key, config))


def _check_windows(
    name: str, windows: Tensor | None, key: Tensor, entries: int, kind: _Kind
) -> None:
    if (windows is None) != (entries == 0):
        raise ValueError(
            f"{name} must hold {entries} entries per page for these settings, "
            f"got {'none' if windows is None else windows.shape[2]}"
        )
    if windows is not None:
        _check_pages(name, windows, key, entries, kind)


def _check_pages(name: str, pages: Tensor, key: Tensor, entries: int, kind: _Kind) -> None:
    expected = (*key.shape[:2], entries, kind.dims)
    if pages.shape != expected:
        raise ValueError(f"{name} must be {list(expected)}, got {list(pages.shape)}")
    if (pages.dtype, pages.device) != (kind.dtype, key.device):
        as_key = " as key is" if kind.dtype == key.dtype else ""
        raise ValueError(
            f"{name} must be {kind.dtype} on {key.device}{as_key}, "
            f"got {pages.dtype} on {pages.device}"
        )
    if pages.stride(-1) != 1:
        raise ValueError(
            f"the elements of {name}'s heads must lie side by side, got stride {pages.stride(-1)}"
        )
