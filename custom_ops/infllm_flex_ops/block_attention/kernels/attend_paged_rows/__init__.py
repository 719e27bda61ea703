"""Triton kernels of ``attend_paged_rows``: dense attention of ragged rows over pages."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from infllm_flex_ops.block_attention.kernels.attend_blocks.nonfinite import ExactTile
from infllm_flex_ops.block_attention.kernels.attend_blocks.plan import (
    choose_tile,
    choose_tile_tokens,
)
from infllm_flex_ops.block_attention.kernels.attend_paged_rows.forward import (
    attend_rows_kernel,
    redo_nonfinite_rows_kernel,
)
from infllm_flex_ops.block_attention.kernels.tile_args import Shape
from infllm_flex_ops.sizes import ceil_div, group_size
from infllm_flex_ops.triton_common.descriptors import can_use_tma, describe
from infllm_flex_ops.triton_common.pages import CachedRows
from infllm_flex_ops.triton_common.tensor_args import view

_REPAIR_PROGRAMS = 64  # per row and head; they share its tokens, and end at once if all is finite


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    first_row: int,
    num_rows: int,
    block_size: int,
    min_queries: int,
    max_queries: int,
    max_length: int,
    scale: float,
) -> None:
    """Attend with a program per tile, KV head and row; redo the heads where NaN or inf came."""
    Hkv, D = k.shape[1], q.shape[2]
    if out.numel() == 0 or min(max_queries, num_rows) == 0:
        return
    G = group_size(q.shape[1], Hkv)
    # Every row sees nearly all keys of a tile: no more rows than a program has.
    tile_tokens = choose_tile_tokens(G, k, block_size, max_length, most_groups=2)
    rows = CachedRows.in_pages(q, block_table, seq_lens, query_start, max_queries, k.shape[2])
    has_nonfinite = torch.zeros(num_rows * Hkv, dtype=torch.int32, device=q.device)
    arguments: dict[str, Any] = {
        "q": rows.q,
        "k": view(k),
        "v": view(v),
        "out": view(out.transpose(0, 1)[None]),
        "pages": rows.pages,
        "seq_lens_ptr": seq_lens,
        "has_nonfinite_ptr": has_nonfinite,
        "first_row": first_row,
        "min_queries": min_queries,
        "max_length": max_length,
        "qk_scale_log2": scale * math.log2(math.e),
        "Hkv": Hkv,
        "SHAPE": Shape(G, D, block_size, tile_tokens, k.shape[2]),
    }
    # The copy engine loads boxes of one page.
    use_tma = can_use_tma(k, v) and k.shape[2] % block_size == 0
    tile, options = choose_tile(q, G * tile_tokens, block_size, use_tma, in_pages=True)
    options.pop("maxnreg", None)  # 128 registers spill here
    tiles = ceil_div(max_queries, tile_tokens)
    attend_rows_kernel[(tiles * tile.PARTS, num_rows * Hkv)](
        **arguments,
        k_desc=describe(k, tile.BLOCK_N) if use_tma else None,
        v_desc=describe(v, tile.BLOCK_N) if use_tma else None,
        TILE=tile,
        **options,
    )
    block_d, heads = tile.BLOCK_D, max(16, triton.next_power_of_2(G))
    redo_nonfinite_rows_kernel[(min(max_queries, _REPAIR_PROGRAMS), num_rows * Hkv)](
        **arguments,
        TILE=ExactTile(heads, 16, block_d, tile.FP32),
        num_warps=8 if heads * block_d > 4096 else 4,
        num_stages=1,
    )
