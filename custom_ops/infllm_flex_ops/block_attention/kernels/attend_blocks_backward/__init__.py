"""Triton kernels of ``attend_blocks_backward``: queries by tile, keys and values by block.

No atomics: a gradient is summed by one program in a fixed order, so its bits repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.dkv import dkv_kernel
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.dq import dq_kernel
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.entries import entries_by_block
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.reduce import reduce_kernel
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.shares import (
    choose_stretch,
    cut_long_lists,
)
from infllm_flex_ops.block_lists import union_lists
from infllm_flex_ops.device import has_little_shared_memory
from infllm_flex_ops.triton_common.descriptors import (
    can_use_tma,
    describe,
    describe_groups,
    describe_lines,
)

_BOXED_ROWS = 64  # of a step for dk and dv, where the copy engine fetches them
# For dk and dv at once, of as few heads as give them: several per multiprocessor. On one H100 with
# 16 single heads at 64K tokens 41 ms, of all heads at once 57; with 32/8 heads 52 and 66.
_MIN_PROGRAMS = 1024


def differentiate(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selected: Tensor,
    block_size: int,
    scale: float,
    tile_tokens: int | None = None,
    unit: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """List the blocks of every tile, and sum the gradients over them."""
    tile_tokens = union_lists.fit_unit(tile_tokens or choose_tile_tokens(q, k), unit)
    lists = union_lists.list_blocks(selected, k.shape[2], block_size, tile_tokens)
    return launch(grad_out, q, k, v, out, lse, *lists, block_size, tile_tokens, scale)


def launch(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num: Tensor,
    idx: Tensor,
    words: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk the lists by tile for dq, and sorted by block for dk and dv."""
    B, Hq, Sq, D = q.shape
    Hkv, Skv = k.shape[1:3]
    dq = torch.empty_like(out)
    dk, dv = (torch.empty(B, Hkv, Skv, D, dtype=x.dtype, device=x.device) for x in (k, v))
    if dq.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    num_tiles = num.shape[2]
    num_blocks = triton.cdiv(Skv, block_size)
    lists = [x.contiguous() for x in (num, idx, words)]
    lse = lse.contiguous()
    strides = (*q.stride(), *k.stride(), *v.stride())
    G = Hq // Hkv
    shared = {"G": G, "D": D, "BLOCK_SIZE": block_size, "TILE_TOKENS": tile_tokens}
    keys_boxed = can_use_tma(k, v)
    rows_boxed = _fill_boxes(tile_tokens, G, D, block_size) and can_use_tma(q, grad_out)
    by_tile, by_block = _tiles(q, G, tile_tokens, block_size, keys_boxed, rows_boxed)
    tile_rows = by_block["PARTS"] * by_block["ROWS"]
    per_row = (B * Hkv, num_tiles, tile_rows)
    row_lse = torch.full(per_row, torch.inf, dtype=torch.float32, device=q.device)
    row_delta = torch.zeros(per_row, dtype=torch.float32, device=q.device)
    tokens = by_block["ROWS"] // triton.next_power_of_2(G)  # of a box
    key_boxes = [describe(x, by_tile["BLOCK_N"]) if keys_boxed else None for x in (k, v)]
    dq_kernel[(B * Hkv * num_tiles * by_tile["PARTS"],)](
        grad_out,
        q,
        k,
        v,
        *key_boxes,
        out,
        lse,
        *lists,
        row_lse,
        row_delta,
        dq,
        *grad_out.stride(),
        *out.stride(),
        *strides,
        Sq,
        Skv,
        num_tiles,
        idx.shape[3],
        scale,
        Hkv,
        **shared,
        **by_tile,
        USE_TMA=keys_boxed,
        TILE_ROWS=tile_rows,
        BOX_TOKENS=tokens if rows_boxed else 0,
        BOX_ROWS=by_block["ROWS"],
    )
    row_boxes = [describe_groups(x, Hkv, tokens) if rows_boxed else None for x in (grad_out, q)]
    begin, count, tile_of, word_of = entries_by_block(*lists, num_blocks)
    num_pairs = num_tiles * min(idx.shape[3], num_blocks)
    shares = cut_long_lists(count, choose_stretch(num_pairs, num_blocks))
    parts = torch.empty(
        B * Hkv * shares.most, 2, block_size, D, dtype=torch.float32, device=q.device
    )
    chunks = triton.cdiv(block_size, by_block["BLOCK_N"])
    dkv_kernel[(B * Hkv * (shares.most + num_blocks) * chunks,)](
        grad_out,
        q,
        k,
        v,
        *row_boxes,
        *(describe_lines(x, by_block["ROWS"]) if rows_boxed else x for x in (row_lse, row_delta)),
        begin,
        count,
        tile_of,
        word_of,
        *shares.tables,
        dk,
        dv,
        parts,
        *grad_out.stride(),
        *strides,
        Sq,
        Skv,
        num_tiles,
        num_blocks,
        shares.most,
        shares.stretch,
        scale,
        Hkv,
        B * Hkv,
        triton.cdiv(_MIN_PROGRAMS, (shares.most + num_blocks) * chunks),
        **shared,
        **by_block,
        USE_TMA=rows_boxed,
        INDEX=tl.int32 if _fit_32_bits(q, grad_out, G, tile_tokens) else tl.int64,
        maxnreg=None if rows_boxed else 255,  # told nothing, ptxas may spill for more programs
    )
    reduce_kernel[(B * Hkv * shares.most * triton.cdiv(block_size, 16),)](
        *shares.tables,
        parts,
        dk,
        dv,
        Skv,
        num_blocks,
        shares.most,
        D,
        block_size,
        16,
        by_block["BLOCK_D"],
        num_warps=8,
    )
    return dq, dk, dv


def choose_tile_tokens(q: Tensor, k: Tensor) -> int:
    """Choose how many tokens share a tile: as many as the rows of one step hold."""
    G = q.shape[1] // k.shape[1]
    if q.element_size() > 2:
        return union_lists.choose_tile_tokens(G, 16)
    if _group_fills_boxes(G, q.shape[3]) and can_use_tma(q):
        return union_lists.choose_tile_tokens(triton.next_power_of_2(G), 64)
    return union_lists.choose_tile_tokens(G, 64, 32)


def _fill_boxes(tile_tokens: int, G: int, D: int, block_size: int) -> bool:
    """Whether boxes of ``_BOXED_ROWS`` cut a tile into whole tokens, and keys fill a step too."""
    rows = tile_tokens * triton.next_power_of_2(G)
    is_power = rows & (rows - 1) == 0
    return _group_fills_boxes(G, D) and is_power and rows >= 16 and block_size % 64 == 0


def _group_fills_boxes(G: int, D: int) -> bool:
    """Whether a box has few enough rows of zeros, and registers are left for so many rows.

    On one H100 with 7 heads to a group, of whose box an eighth is zeros, the backward took 41 ms
    at 32K tokens without boxes; with 8 heads and boxes 28.
    """
    padded = triton.next_power_of_2(G)
    return padded <= _BOXED_ROWS and 5 * padded <= 8 * G and D <= 128


def _fit_32_bits(q: Tensor, grad_out: Tensor, G: int, tile_tokens: int) -> bool:
    """Whether offsets between the rows of a tile do, in both tensors."""
    return all(
        abs(x.stride(1)) * G + abs(x.stride(2)) * tile_tokens + abs(x.stride(3)) * x.shape[3]
        < 1 << 31
        for x in (q, grad_out)
    )


def _tiles(
    q: Tensor, G: int, tile_tokens: int, block_size: int, keys_boxed: bool, rows_boxed: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Choose rows and keys at a time, for dq and for dk and dv, that the registers hold."""
    block_d = max(16, triton.next_power_of_2(q.shape[3]))
    block_n = triton.next_power_of_2(block_size)
    fp32 = q.element_size() > 2  # float32 without tensor cores: operands in registers
    masked = q.shape[3] < block_d or block_size % 64 != 0  # masks take registers

    def tile(
        most_rows: int, most_keys: int, warps: int, tile_rows: int = G * tile_tokens
    ) -> dict[str, int]:
        rows = max(16, min(most_rows, triton.next_power_of_2(tile_rows)))
        return {
            "PARTS": triton.cdiv(tile_rows, rows),
            "ROWS": rows,
            "BLOCK_N": max(16, min(most_keys, block_n)),
            "BLOCK_D": block_d,
            "FP32": fp32,
            "num_warps": warps,
            "num_stages": 1 if fp32 else 2,
        }

    if fp32:
        return tile(16, 16, 4), tile(16, 16, 8 if block_d > 128 else 4)
    if block_d > 128:
        return tile(32, 32 if has_little_shared_memory(q) else 64, 8), tile(32, 32, 8)
    roomy = keys_boxed or not (masked or tile_tokens > 32)  # words of 64 bits take registers, too
    by_tile = tile(64, 64 if block_d == 128 and roomy else 32, 4)
    if rows_boxed:
        return by_tile, tile(_BOXED_ROWS, 64, 4, triton.next_power_of_2(G) * tile_tokens)
    if block_d == 128:
        return by_tile, tile(32, 64, 8 if masked else 4)
    return by_tile, (tile(32, 32, 8) if masked else tile(32, 64, 4))
