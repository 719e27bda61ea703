"""Triton kernels of ``attend_blocks_backward``: queries by tile, keys and values by block.

No atomics: a gradient is summed by one program in a fixed order, so its bits repeat.
"""

import torch
import triton
from torch import Tensor

from custom_ops.kernels.attend_blocks_backward.dkv import dkv_kernel
from custom_ops.kernels.attend_blocks_backward.dq import dq_kernel
from custom_ops.kernels.attend_blocks_backward.entries import entries_by_block


def launch(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num: Tensor,
    kv_idx: Tensor,
    words: Tensor,
    full_num: Tensor,
    full_idx: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk the lists by tile for dq, and sorted by block for dk and dv."""
    B, Hq, Sq, D = q.shape
    Hkv, Skv = k.shape[1:3]
    dq = torch.empty(B, Hq, Sq, D, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(B, Hkv, Skv, D, dtype=x.dtype, device=x.device) for x in (k, v))
    if dq.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    delta = torch.empty(B, Hq, Sq, dtype=torch.float32, device=q.device)
    num_tiles = kv_num.shape[2]
    num_blocks = triton.cdiv(Skv, block_size)
    lists = [x.contiguous() for x in (kv_num, kv_idx, words, full_num, full_idx)]
    grad_out, out, lse = (x.contiguous() for x in (grad_out, out, lse))
    strides = (*q.stride(), *k.stride(), *v.stride())
    G = Hq // Hkv
    shared = {"G": G, "D": D, "BLOCK_SIZE": block_size, "TILE_TOKENS": tile_tokens}
    by_tile, by_block = _tiles(q, G * tile_tokens, block_size)
    dq_kernel[(B * Hkv * num_tiles * by_tile["PARTS"],)](
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        *lists,
        delta,
        dq,
        *strides,
        Sq,
        Skv,
        num_tiles,
        kv_idx.shape[3],
        full_idx.shape[3],
        scale,
        Hkv,
        **shared,
        **by_tile,
    )
    chunks = triton.cdiv(block_size, by_block["BLOCK_N"])
    dkv_kernel[(B * Hkv * num_blocks * chunks,)](
        grad_out,
        q,
        k,
        v,
        lse,
        delta,
        *entries_by_block(*lists, num_blocks),
        dk,
        dv,
        *strides,
        Sq,
        Skv,
        num_blocks,
        scale,
        Hkv,
        **shared,
        **by_block,
    )
    return dq, dk, dv


def _tiles(q: Tensor, tile_rows: int, block_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Choose rows and keys at a time, for dq and for dk and dv, that the registers hold."""
    D = q.shape[3]
    block_d = max(16, triton.next_power_of_2(D))
    in_parts = q.element_size() > 2  # float32 without tensor cores: operands in registers

    def tile(most_rows: int, most_keys: int, warps: int) -> dict[str, int]:
        rows = max(16, min(most_rows, triton.next_power_of_2(tile_rows)))
        return {
            "PARTS": triton.cdiv(tile_rows, rows),
            "ROWS": rows,
            "BLOCK_N": max(16, min(most_keys, triton.next_power_of_2(block_size))),
            "BLOCK_D": block_d,
            "IN_PARTS": in_parts,
            "num_warps": 4 if rows < 64 and D == 128 else warps,
            "num_stages": 1 if in_parts else 2,
        }

    if in_parts:
        return tile(16, 16, 4), tile(16, 16, 4)
    if block_d > 128:
        return tile(32, 64, 8), tile(32, 32, 8)
    if block_d == 128:
        return tile(64, 64, 8), tile(64 if D == 128 else 32, 64, 8)
    return tile(64, 32, 4), (tile(32, 64, 4) if D == 64 else tile(32, 32, 8))
