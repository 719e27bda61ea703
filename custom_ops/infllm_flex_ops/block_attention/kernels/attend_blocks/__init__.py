"""Triton kernels of ``attend_blocks``: softmax attention of tiles to the blocks in their lists."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from infllm_flex_ops.block_attention.kernels.attend_blocks.careful import (
    attend_carefully_kernel,
    find_special_kernel,
)
from infllm_flex_ops.block_attention.kernels.attend_blocks.forward import attend_kernel
from infllm_flex_ops.block_attention.kernels.tile_args import Shape, Tile
from infllm_flex_ops.block_lists import union_lists
from infllm_flex_ops.device import compute_capability, knows_gluon
from infllm_flex_ops.sizes import group_size
from infllm_flex_ops.triton_common.descriptors import can_use_tma, describe, describe_for_gluon
from infllm_flex_ops.triton_common.tensor_args import Lists, view

_CAREFUL_PROGRAMS = 512  # per head; they share its tokens, and end at once where there is nothing
_SEARCHED_KEYS = 64  # keys that a program searches for nan and inf
_WIDE_KEYS = 48 << 10  # up to here tiles of 128 rows pay for groups of 4 to 7 heads, too
_GROUP_ROWS = 64  # of a warpgroup, of which two divide a tile
_GROUP_KEYS = 64  # keys per block that they were measured with


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    block_size: int,
    scale: float,
    tile_tokens: int | None = None,
    unit: int | None = None,
    num: Tensor | None = None,
    idx: Tensor | None = None,
    words: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """List the blocks of every tile, unless the lists are given, and attend to them."""
    if num is None or idx is None or words is None or tile_tokens is None:
        tile_tokens = tile_tokens or choose_tile_tokens(group_size(q, k), k, block_size)
        tile_tokens = union_lists.fit_unit(tile_tokens, unit)
        num, idx, words = union_lists.list_blocks(selected, k.shape[2], block_size, tile_tokens)
    return launch(q, k, v, num, idx, words, block_size, tile_tokens, scale)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num: Tensor,
    idx: Tensor,
    words: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Allocate the output and its log-sum-exp, and attend with a program per tile and KV head."""
    B, Hq, Sq, _ = q.shape
    Hkv = k.shape[1]
    out = torch.empty_like(q)
    lse = torch.empty(B, Hq, Sq, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    boxed = can_use_tma(k, v)
    tile_rows = Hq // Hkv * tile_tokens
    lists = num.contiguous(), idx.contiguous(), words.contiguous()
    arguments = _arguments(q, k, v, lists, out, lse, block_size, tile_tokens, scale)
    programs = B * Hkv * num.shape[2]
    if boxed and can_specialize(q, tile_rows, block_size):
        from infllm_flex_ops.block_attention.kernels.attend_blocks.specialized import (
            attend_specialized_kernel,
        )

        gluon_boxes = [describe_for_gluon(x, block_size) for x in (k, v)]
        divided = choose_specialized(q)
        attend_specialized_kernel[(programs,)](*arguments, *gluon_boxes, **divided)
    else:
        tile, options = choose_tile(q, tile_rows, block_size, boxed)
        k_desc, v_desc = (describe(x, tile.BLOCK_N) if boxed else None for x in (k, v))
        attend_kernel[(programs * tile.PARTS,)](
            q=view(q),
            k=view(k),
            v=view(v),
            k_desc=k_desc,
            v_desc=v_desc,
            lists=Lists(*lists, lists[1].shape[3]),
            out=view(out),
            lse_ptr=lse,
            Sq=q.shape[2],
            Skv=k.shape[2],
            num_tiles=num.shape[2],
            qk_scale_log2=scale * math.log2(math.e),
            Hkv=Hkv,
            SHAPE=Shape(Hq // Hkv, q.shape[3], block_size, tile_tokens),
            TILE=tile,
            **options,
        )
    _attend_carefully(k, v, q, arguments)
    return out, lse


def redo_special_heads(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, block_size: int, scale: float
) -> None:
    """Overwrite ``out`` of the heads whose keys or values hold nan or inf, in place."""
    if out.numel() == 0:
        return
    num = (selected >= 0).sum(-1, dtype=torch.int32)
    lists = (num, selected.contiguous(), None)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    arguments = _arguments(q, k, v, lists, out, lse, block_size, 1, scale)
    _attend_carefully(k, v, q, arguments)


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: tuple[Tensor, Tensor, Tensor | None],
    out: Tensor,
    lse: Tensor,
    block_size: int,
    tile_tokens: int,
    scale: float,
) -> tuple[Any, ...]:
    """What both kernels take."""
    Hkv, Skv = k.shape[1:3]
    return (
        q,
        k,
        v,
        *lists,
        out,
        lse,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride(),
        q.shape[2],
        Skv,
        lists[0].shape[2],
        lists[1].shape[3],
        scale * math.log2(math.e),
        Hkv,
        q.shape[1] // Hkv,
        q.shape[3],
        block_size,
        tile_tokens,
    )


def _attend_carefully(k: Tensor, v: Tensor, q: Tensor, arguments: tuple[Any, ...]) -> None:
    """Write the result again for the heads that hold nan or inf; nothing waits to know."""
    B, Hkv, Skv, D = k.shape
    block_d = max(16, triton.next_power_of_2(D))
    rows = max(16, triton.next_power_of_2(q.shape[1] // Hkv))
    fp32 = q.element_size() > 2
    special = torch.zeros(B * Hkv, dtype=torch.int32, device=q.device)
    find_special_kernel[(B * Hkv * triton.cdiv(Skv, _SEARCHED_KEYS),)](
        k,
        v,
        special,
        *k.stride(),
        *v.stride(),
        Skv,
        Hkv,
        D,
        _SEARCHED_KEYS,
        block_d,
        num_warps=8,
    )
    attend_carefully_kernel[(B * Hkv, min(q.shape[2], _CAREFUL_PROGRAMS))](
        special,
        *arguments,
        ROWS=rows,
        BLOCK_N=16,
        BLOCK_D=block_d,
        FP32=fp32,
        num_warps=8 if fp32 or rows * block_d > 4096 else 4,
        num_stages=1,
    )


def choose_tile_tokens(G: int, k: Tensor, block_size: int) -> int:
    """Choose the tokens per tile: as many as fit into the rows of a program."""
    # Words of 64 bits take registers: only where they were measured.
    most = union_lists.MAX_TILE_TOKENS if compute_capability(k) == 90 else 32
    return union_lists.choose_tile_tokens(G, _most_rows(G, k, block_size), most)


def _most_rows(G: int, k: Tensor, block_size: int) -> int:
    """Rows of the largest tile worth its union.

    More rows load more keys at once, of which each row uses fewer.
    """
    if k.element_size() > 2:
        return 16  # float32 without tensor cores: operands in registers
    if can_specialize(k, 2 * _GROUP_ROWS, block_size):
        return 2 * _GROUP_ROWS
    # On one H200 at 64K and 128K tokens two programs of 128 rows side by side take 2 to 8 % less
    # time than more of 64 with 16 heads to a group. With 4, whose tokens choose less alike, on one
    # H100: 8 % less at 32K, the same at 64K, 2 % more at 128K; with 7 2 % less, the same, 9 % more.
    fits = compute_capability(k) == 90 and k.shape[3] in (64, 128)
    wide = fits and (G >= 8 or (G >= 4 and k.shape[2] <= _WIDE_KEYS))
    return 128 if wide else 64


def can_specialize(q: Tensor, tile_rows: int, block_size: int) -> bool:
    """Whether tiles are walked by warps that divide the work, where keys and values are boxed.

    On one H200 with 16 and 4 heads to a group at 64K tokens that takes 15 % less time than the
    other kernel with tiles of 128 rows, which is as fast as with 64.
    """
    block_d = triton.next_power_of_2(q.shape[3])
    fits = q.element_size() == 2 and block_d in (64, 128) and block_size == _GROUP_KEYS
    fits = fits and _GROUP_ROWS < tile_rows <= 2 * _GROUP_ROWS
    return fits and compute_capability(q) == 90 and knows_gluon()


def choose_specialized(q: Tensor) -> dict[str, Any]:
    """Choose how much room the warps that divide the work get."""
    block_d = triton.next_power_of_2(q.shape[3])
    return {
        "BLOCK_D": block_d,
        "SLOTS": 6,  # of keys and values: 192 KiB with head dim 128
        "GROUP_REGISTERS": 232,
        "FETCH_REGISTERS": 24,
        "num_warps": 4,
    }


def choose_tile(
    q: Tensor, tile_rows: int, block_size: int, use_tma: bool
) -> tuple[Tile, dict[str, int]]:
    """Choose how many of the tile's rows a program takes, and how many keys at a time."""
    block_d = max(16, triton.next_power_of_2(q.shape[3]))
    fp32 = q.element_size() > 2
    # Wide heads take registers, and so do masks, of a head dim that is no power of two.
    masked = q.shape[3] < block_d and not (use_tma and tile_rows >= 64)
    costly = block_d > 128 or masked
    most_rows, most_keys = (16, 16) if fp32 else (64, 32) if costly else (128, 64)
    rows = max(16, min(most_rows, triton.next_power_of_2(tile_rows)))
    # Triton 3.7 gives four warps too few registers on sm_100 for these.
    wide = rows == 64 and (costly or block_d < 128)
    tile = Tile(
        PARTS=triton.cdiv(tile_rows, rows),
        ROWS=rows,
        BLOCK_N=max(16, min(most_keys, triton.next_power_of_2(block_size))),
        BLOCK_D=block_d,
        FP32=fp32,
        USE_TMA=use_tma,
    )
    options = {
        "num_warps": 8 if rows == 128 or wide or (fp32 and block_d <= 128) else 4,
        "num_stages": 1 if fp32 else 2,
    }
    if rows == 128 and compute_capability(q) == 90:
        options["maxnreg"] = 128  # two programs side by side on a multiprocessor
    return tile, options
