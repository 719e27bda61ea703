"""The tensor and settings factories of the tests."""

import torch
from torch import Tensor

from infllm_flex import InfLLMConfig

# Windows of 8 keys and blocks of 16: short sequences behave like long ones.
SMALL = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 16,
    "window_size": 32,
    "topk": 3,
    "dense_len": -1,
}


def small_config(**overrides: object) -> InfLLMConfig:
    return InfLLMConfig.from_dict({**SMALL, **overrides})


def on_default_device(x: Tensor) -> Tensor:
    """Move a tensor drawn on the CPU, so that every device gets the same numbers."""
    return x.to(torch.get_default_device())


def draw_normal(*shape: int, seed: int) -> Tensor:
    """Draw float32 from the normal distribution."""
    random = torch.Generator().manual_seed(seed)
    return on_default_device(torch.randn(shape, generator=random, device="cpu"))


def make_qkv(
    S: int,
    *,
    B: int = 1,
    Hq: int = 4,
    Hkv: int = 2,
    D: int = 16,
    Sq: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw normal queries (the last ``Sq`` of ``S``), keys and values."""
    random = torch.Generator().manual_seed(seed)
    shapes = (B, Hq, S if Sq is None else Sq, D), (B, Hkv, S, D), (B, Hkv, S, D)
    drawn = (torch.randn(shape, generator=random, device="cpu") for shape in shapes)
    q, k, v = (on_default_device(x.to(dtype)) for x in drawn)
    return q, k, v


def make_selected(
    S: int, *, K: int = 5, B: int = 1, Hkv: int = 2, block_size: int = 16, seed: int = 0
) -> Tensor:
    """Draw a selection of at most K visible blocks, ascending, the own block among them."""
    random = torch.Generator().manual_seed(seed)
    num_blocks = -(-S // block_size)
    own = torch.arange(S)[:, None] // block_size
    score = on_default_device(torch.rand(B, Hkv, S, num_blocks, generator=random, device="cpu"))
    block = torch.arange(num_blocks)
    score = score.masked_fill(block > own, -1.0).masked_fill(block == own, 2.0)
    best, index = score.topk(min(K, num_blocks))
    index = index.masked_fill(best < 0, num_blocks).sort(-1).values
    return index.masked_fill(index == num_blocks, -1).int()
