"""Caches with rows of every kind, for the operators that decode."""

import torch
from torch import Tensor

from infllm_flex import CompressedKeys, InfLLMConfig


def make_cache(
    config: InfLLMConfig,
    rows: list[tuple[int, int]],
    S: int,
    *,
    n: int = 1,
    Hq: int = 4,
    Hkv: int = 2,
    D: int = 16,
    dtype: torch.dtype = torch.float32,
    whole_numbers: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, CompressedKeys]:
    """Draw queries, keys and values; NaN in all slots outside of ``rows``, given as start and end.

    Small whole numbers make dot products exact, so that no rounding can change a selection.
    """
    random = torch.Generator().manual_seed(seed)
    sizes = ((len(rows), Hq, n, D), (len(rows), Hkv, S, D), (len(rows), Hkv, S, D))
    if whole_numbers:
        q, k, v = (torch.randint(-3, 4, size, generator=random).to(dtype) for size in sizes)
    else:
        q, k, v = (torch.randn(size, generator=random).to(dtype) for size in sizes)
    for row, (start, end) in enumerate(rows):
        for x in (k, v):
            x[row, :, :start] = x[row, :, end:] = torch.nan
    start, end = (torch.tensor(x) for x in zip(*rows, strict=True))
    state = CompressedKeys(config, k)
    state.append(k, S, start=start, end=end)
    if whole_numbers:  # means are not whole
        windows = state.compressed, state.coarse
        for x in windows:
            x.copy_(torch.randint(-3, 4, x.shape, generator=random))
    return q, k, v, state
