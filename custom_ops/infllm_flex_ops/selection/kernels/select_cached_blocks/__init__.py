"""Triton kernels of ``select_cached_blocks``: few queries, the windows cut among programs.

Grids are sized by the room that the windows have; programs beyond a row's length end at once. So
nothing depends on lengths but what the device reads, and the launches fit in a CUDA graph.
"""

import math

import torch
import triton
from torch import Tensor

from infllm_flex_ops.selection.kernels.select_blocks.workspace import MAX_BLOCKS
from infllm_flex_ops.selection.kernels.select_cached_blocks.lse import cached_lse_kernel
from infllm_flex_ops.selection.kernels.select_cached_blocks.pick import pick_cached
from infllm_flex_ops.selection.kernels.select_cached_blocks.scores import cached_score_kernel
from infllm_flex_ops.selection.rule import SelectionRule

_MAX_RUNS = 64  # of coarse keys, a program each; the next kernel reads what all of them found
_MAX_ROWS = 64  # heads x tokens of a tile
_PROGRAMS = 512  # as many as a GPU holds at a time: a second wave would wait for the first


def launch(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    start: Tensor,
    end: Tensor,
    rule: SelectionRule,
    dense_len: int,
    width: int,
    scale: float,
) -> Tensor:
    """Normalise, score and pick: three launches."""
    kernel_size, kernel_stride, coarse_size, coarse_stride, block_size, *_ = rule
    _, _, _, _, _, init_blocks, local_blocks, num_selected = rule
    B, _, n, _ = q.shape
    Hkv, C = compressed.shape[1:3]
    blocks = triton.cdiv((C - 1) * kernel_stride + kernel_size, block_size) if C else 0
    columns = max(0, blocks - local_blocks)  # those that may lie before a query's window
    if columns > MAX_BLOCKS:
        raise NotImplementedError(
            f"select_cached_blocks handles at most {MAX_BLOCKS} blocks beside the window on CUDA, "
            f"got {columns}: use a larger block_size"
        )
    out = torch.empty(B, Hkv, n, width, dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out
    scores = torch.empty(B * Hkv, n, max(columns, 1), dtype=torch.float32, device=q.device)
    if columns and blocks >= num_selected:
        _score(
            q,
            compressed,
            coarse,
            start,
            end,
            scores,
            (kernel_size, kernel_stride, coarse_size, coarse_stride),
            block_size,
            local_blocks,
            num_selected,
            dense_len,
            scale,
        )
    return pick_cached(
        scores,
        start,
        end,
        out,
        columns=columns,
        num_selected=num_selected,
        dense_len=dense_len,
        block_size=block_size,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
    )


def _score(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    start: Tensor,
    end: Tensor,
    scores: Tensor,
    windows: tuple[int, int, int, int],
    block_size: int,
    local_blocks: int,
    num_selected: int,
    dense_len: int,
    scale: float,
) -> None:
    B, Hq, n, D = q.shape
    Hkv = compressed.shape[1]
    kernel_size, kernel_stride, coarse_size, coarse_stride = windows
    per_block, before = block_size // kernel_stride, kernel_size // kernel_stride - 1
    slots = triton.next_power_of_2(per_block + before)
    tile = _tile(q, Hkv, slots)
    tiles = triton.cdiv(n, tile["TOKENS"])
    rows = B * Hkv * tiles
    num_coarse, unit = coarse.shape[2], tile["BLOCK_N"]
    share = max(triton.cdiv(num_coarse, _MAX_RUNS), triton.cdiv(num_coarse * rows, _PROGRAMS), 1)
    run_keys = unit * triton.cdiv(share, unit)
    runs = max(1, triton.cdiv(num_coarse, run_keys))
    parts = torch.empty(
        rows * runs,
        2,
        tile["HEADS"] * tile["TOKENS"],
        dtype=torch.float32,
        device=q.device,
    )
    shared = {
        "G": Hq // Hkv,
        "D": D,
        "KERNEL_SIZE": kernel_size,
        "KERNEL_STRIDE": kernel_stride,
        "COARSE_SIZE": coarse_size,
        "COARSE_STRIDE": coarse_stride,
        "FITTING": num_selected * block_size,
        **tile,
    }
    factor = scale * math.log2(math.e)
    cached_lse_kernel[(runs, B * Hkv, tiles)](
        q,
        compressed,
        coarse,
        start,
        end,
        parts,
        *q.stride(),
        *compressed.stride(),
        *coarse.stride(),
        n,
        compressed.shape[2],
        num_coarse,
        run_keys,
        factor,
        dense_len,
        Hkv,
        **shared,
    )
    columns = scores.shape[-1]
    unit = tile["BLOCK_N"] // slots
    split_blocks = unit * triton.cdiv(columns * rows, unit * _PROGRAMS)
    cached_score_kernel[(triton.cdiv(columns, split_blocks), B * Hkv, tiles)](
        q,
        compressed,
        start,
        end,
        parts,
        scores,
        *q.stride(),
        *compressed.stride(),
        n,
        compressed.shape[2],
        num_coarse,
        columns,
        runs,
        run_keys,
        split_blocks,
        factor,
        dense_len,
        Hkv,
        BLOCK_SIZE=block_size,
        LOCAL_BLOCKS=local_blocks,
        PER_BLOCK=per_block,
        BEFORE=before,
        SLOTS=slots,
        RUNS=triton.next_power_of_2(runs),
        **shared,
    )


def _tile(q: Tensor, Hkv: int, slots: int) -> dict[str, int]:
    """Choose as many rows as a matrix instruction takes, and more tokens where there are more."""
    heads = triton.next_power_of_2(q.shape[1] // Hkv)
    most = max(_MAX_ROWS // heads, 1)
    tokens = max(min(triton.next_power_of_2(q.shape[2]), most), 16 // heads, 1)
    wide = q.element_size() > 2  # float32 without tensor cores
    return {
        "HEADS": heads,
        "TOKENS": tokens,
        "BLOCK_N": max(32 if wide else 64, slots),
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[3])),
        "FP32": wide,
        "num_warps": 4,
        "num_stages": 1 if wide else 3,
    }
