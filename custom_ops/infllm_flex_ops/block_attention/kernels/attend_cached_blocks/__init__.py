"""Triton kernels of ``attend_cached_blocks``: a query's list split among programs, then joined."""

import math

import torch
from torch import Tensor

from infllm_flex_ops.block_attention.kernels.attend_cached_blocks.join import join_kernel
from infllm_flex_ops.block_attention.kernels.attend_cached_blocks.split import (
    Shape,
    Tile,
    split_kernel,
)
from infllm_flex_ops.device import has_little_shared_memory
from infllm_flex_ops.sizes import ceil_div, next_power_of_2
from infllm_flex_ops.triton_common.tensor_args import view

_PROGRAMS = 512  # several per multiprocessor
_MAX_SPLITS = 128  # per list; the joining kernel reads all of them at once
_PART = 32  # elements of a value that one joining program takes


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    start: Tensor,
    end: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    """Attend to a few slots of a list per program; join the parts by their log-sum-exp."""
    B, Hq, n, D = q.shape
    Hkv, S = k.shape[1:3]
    W = selected.shape[-1]
    out = torch.empty(B, Hq, n, D, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    slots, splits = _split(W, B * Hkv * n)
    shape = Shape(Hq // Hkv, D, block_size)
    tile, options = _choose_tile(q, k, v, shape)
    parts = torch.empty(
        B * Hkv * n, splits, tile.ROWS, tile.BLOCK_D + 2, dtype=torch.float32, device=q.device
    )
    split_kernel[(splits, n, B * Hkv)](
        q=view(q),
        k=view(k),
        v=view(v),
        selected=view(selected),
        start_ptr=start,
        end_ptr=end,
        parts_ptr=parts,
        n=n,
        S=S,
        W=W,
        slots=slots,
        qk_scale_log2=scale * math.log2(math.e),
        Hkv=Hkv,
        SHAPE=shape,
        TILE=tile,
        **options,
    )
    part = min(_PART, tile.BLOCK_D)
    join_kernel[(shape.G * ceil_div(D, part), n, B * Hkv)](
        parts,
        out,
        n,
        splits,
        G=shape.G,
        D=D,
        ROWS=tile.ROWS,
        BLOCK_D=tile.BLOCK_D,
        PART=part,
        SPLITS=next_power_of_2(splits),
        num_warps=4,
    )
    return out


def _split(width: int, num_lists: int) -> tuple[int, int]:
    """Choose the slots per program and the programs per list."""
    wanted = max(1, min(_MAX_SPLITS, _PROGRAMS // num_lists))
    slots = max(1, ceil_div(width, wanted))
    return slots, max(1, ceil_div(width, slots))


def _choose_tile(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> tuple[Tile, dict[str, int]]:
    """Choose the sizes of a program, and Triton's options."""
    is_half = q.element_size() == 2
    is_wide = max(x.element_size() for x in (q, k, v)) > 2  # a cache may be wider than queries
    rows = max(16, next_power_of_2(shape.G))
    block_d = max(16, next_power_of_2(shape.D))
    block_n = max(16, min(32 if is_wide else 64, next_power_of_2(shape.BLOCK_SIZE)))
    # Wide heads of a cache that is cast as it is read take more registers.
    many_warps = rows > 32 or (is_wide and is_half and block_d > 128)
    options = {
        "num_warps": 8 if many_warps else 4,
        "num_stages": 1 if is_wide else _num_stages(q, block_d),
    }
    return Tile(rows, block_n, block_d, q.element_size() > 2), options


def _num_stages(q: Tensor, block_d: int) -> int:
    """Choose how many blocks are loaded at once; three of the widest heads take 138 KiB."""
    return 2 if block_d > 128 and has_little_shared_memory(q) else 3
