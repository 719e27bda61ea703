"""Triton kernel of ``attend_blocks``: softmax attention of tiles to the blocks in their lists."""

import math

import torch
import triton
from torch import Tensor

from custom_ops.kernels.attend_blocks.forward import attend_kernel


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    words: Tensor,
    full_num: Tensor,
    full_idx: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Allocate the output and its log-sum-exp, and attend with a program per tile and KV head."""
    B, Hq, Sq, D = q.shape
    Hkv, Skv = k.shape[1:3]
    out = torch.empty(B, Hq, Sq, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, Hq, Sq, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    num_tiles = kv_num.shape[2]
    tile = _tile(q, Hq // Hkv * tile_tokens, block_size)
    attend_kernel[(B * Hkv * num_tiles * tile["PARTS"],)](
        q,
        k,
        v,
        *(x.contiguous() for x in (kv_num, kv_idx, words, full_num, full_idx)),
        out,
        lse,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        Sq,
        Skv,
        num_tiles,
        kv_idx.shape[3],
        scale * math.log2(math.e),
        Hkv,
        Hq // Hkv,
        D,
        block_size,
        tile_tokens,
        **tile,
    )
    return out, lse


def _tile(q: Tensor, tile_rows: int, block_size: int) -> dict[str, int]:
    """Choose how many of the tile's rows a program takes, and how many keys at a time."""
    block_d = max(16, triton.next_power_of_2(q.shape[3]))
    in_parts = q.element_size() > 2  # float32 without tensor cores: operands in registers
    # Wide heads take registers, and so do the masks of a head dim that is no power of two.
    costly = block_d > 128 or q.shape[3] < block_d
    most_rows, most_keys = (16, 16) if in_parts else (64, 32) if costly else (128, 64)
    rows = max(16, min(most_rows, triton.next_power_of_2(tile_rows)))
    # Triton 3.7 gives four warps too few registers on sm_100 for these.
    wide = rows == 64 and (costly or block_d < 128)
    return {
        "PARTS": triton.cdiv(tile_rows, rows),
        "ROWS": rows,
        "BLOCK_N": max(16, min(most_keys, triton.next_power_of_2(block_size))),
        "BLOCK_D": block_d,
        "IN_PARTS": in_parts,
        "num_warps": 8 if rows == 128 or wide or (in_parts and block_d <= 128) else 4,
        "num_stages": 1 if in_parts else 2 if costly else 3,
    }
