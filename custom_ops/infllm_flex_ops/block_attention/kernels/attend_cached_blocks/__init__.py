"""Triton kernels of ``attend_cached_blocks``: a query's list cut among programs, then joined."""

import math

import torch
import triton
from torch import Tensor

from infllm_flex_ops.block_attention.kernels.attend_cached_blocks.join import join_kernel
from infllm_flex_ops.block_attention.kernels.attend_cached_blocks.split import split_kernel
from infllm_flex_ops.device import has_little_shared_memory

_PROGRAMS = 512  # several per multiprocessor
_MAX_SPLITS = 128  # of a list; the joining kernel reads what all of them found at once
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
    """Attend to a few slots of a list per program; join their results by log-sum-exp."""
    B, Hq, n, D = q.shape
    Hkv, S = k.shape[1:3]
    W = selected.shape[-1]
    out = torch.empty(B, Hq, n, D, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    wanted = max(1, min(_MAX_SPLITS, _PROGRAMS // (B * Hkv * n)))
    slots = max(1, triton.cdiv(W, wanted))
    splits = max(1, triton.cdiv(W, slots))
    G = Hq // Hkv
    rows = max(16, triton.next_power_of_2(G))
    block_d = max(16, triton.next_power_of_2(D))
    parts = torch.empty(
        B * Hkv * n, splits, rows, block_d + 2, dtype=torch.float32, device=q.device
    )
    wide = max(x.element_size() for x in (q, k, v)) > 2
    split_kernel[(splits, n, B * Hkv)](
        q,
        k,
        v,
        selected,
        start,
        end,
        parts,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *selected.stride(),
        n,
        S,
        W,
        slots,
        scale * math.log2(math.e),
        Hkv,
        G=G,
        D=D,
        BLOCK_SIZE=block_size,
        ROWS=rows,
        BLOCK_N=max(16, min(32 if wide else 64, triton.next_power_of_2(block_size))),
        BLOCK_D=block_d,
        FP32=q.element_size() > 2,
        # Wide heads of a cache that is cast as it is read take more registers.
        num_warps=8 if rows > 32 or (wide and q.element_size() == 2 and block_d > 128) else 4,
        num_stages=1 if wide else _stages(q, block_d),
    )
    part = min(_PART, block_d)
    join_kernel[(G * triton.cdiv(D, part), n, B * Hkv)](
        parts,
        out,
        n,
        splits,
        G=G,
        D=D,
        ROWS=rows,
        BLOCK_D=block_d,
        PART=part,
        SPLITS=triton.next_power_of_2(splits),
        num_warps=4,
    )
    return out


def _stages(q: Tensor, block_d: int) -> int:
    """Choose how many blocks are on their way at once; three of the widest heads take 138 KiB."""
    return 2 if block_d > 128 and has_little_shared_memory(q) else 3
