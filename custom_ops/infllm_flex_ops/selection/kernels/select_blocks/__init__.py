"""Triton kernels of ``select_blocks``, run over chunks of queries within a fixed workspace."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from infllm_flex_ops.device import knows_gluon
from infllm_flex_ops.selection.documents import check_documents
from infllm_flex_ops.selection.kernels.select_blocks.lse import lse_kernel
from infllm_flex_ops.selection.kernels.select_blocks.pick import SEGMENT
from infllm_flex_ops.selection.kernels.select_blocks.picking import Picker, divide_into_parts
from infllm_flex_ops.selection.kernels.select_blocks.scores import score_kernel
from infllm_flex_ops.selection.kernels.select_blocks.workspace import (
    MAX_BLOCKS,
    SCORE_BYTES,
    chunk,
    split,
)
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.triton_common.descriptors import can_use_tma, describe, describe_strided

_LSE_BYTES = 64 << 20


def launch(
    q: Tensor,
    compressed: Tensor,
    coarse: Tensor,
    kv_len: int,
    rule: SelectionRule,
    scale: float,
    documents: Tensor | None = None,
) -> Tensor:
    """Fill the rows that take every block directly, and score the others chunk by chunk."""
    check_documents(documents, kv_len, q.shape[2])
    kernel_size, kernel_stride, coarse_size, coarse_stride, block_size, *_ = rule
    _, _, _, _, _, init_blocks, local_blocks, num_selected = rule
    B, _, Sq, _ = q.shape
    Hkv = compressed.shape[1]
    num_blocks = triton.cdiv(kv_len, block_size)
    if num_blocks > MAX_BLOCKS:
        raise NotImplementedError(
            f"select_blocks handles at most {MAX_BLOCKS} blocks on CUDA, got {num_blocks}: "
            f"use a larger block_size"
        )
    K = min(num_selected, num_blocks)
    out = torch.empty(B, Hkv, Sq, K, dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out
    offset = kv_len - Sq
    per_block = block_size // kernel_stride
    before = kernel_size // kernel_stride - 1
    # Windows that begin before a block: scored with the block they begin in, or, if they begin
    # further back than in the one before, scored again.
    tail, before = (before, 0) if before <= per_block else (0, before)
    slots = triton.next_power_of_2(per_block + before)
    tile = _tile(q, Hkv, slots)
    tokens, tile_rows = tile["TOKENS"], tile["HEADS"] * tile["TOKENS"]
    parts = divide_into_parts(documents, kv_len, offset, tokens)
    documents = None if documents is None else documents.contiguous()
    table = out if documents is None else documents
    sizes = {"BLOCK_SIZE": block_size, "PART": parts.size, "PART_ROWS": parts.rows}

    # Of the last block, which is never scored if it is local, the boxes may lack some windows.
    strided = before == 0 and local_blocks > 0 and compressed.shape[2] >= per_block
    strided = strided and _can_stride(q, compressed, tile)
    step_blocks = 64 if strided else tile["BLOCK_N"] // slots
    picker = Picker(
        out,
        documents,
        parts,
        offset,
        num_blocks,
        block_size,
        init_blocks,
        local_blocks,
        num_selected,
        keeps_bests=step_blocks % SEGMENT.value == 0,
    )

    all_heads = range(B * Hkv)
    num_rows, first_scored = parts.total, 0
    if documents is None:  # else only the device knows which rows take every block
        num_rows, first_scored = Sq, min(max(num_selected * block_size - offset, 0), Sq)
    if first_scored:
        picker.pick(out, out, all_heads, range(first_scored), 0)
    if first_scored == num_rows:
        return out

    columns = (kv_len - 1) // block_size - local_blocks
    columns = max(64, triton.cdiv(columns, 64) * 64)  # rows start aligned, for wide loads
    num_tiles = triton.cdiv(num_rows - first_scored, tokens)
    step_heads, step_tiles = chunk(
        SCORE_BYTES, 4 * (columns + columns // SEGMENT.value) * tokens, B * Hkv, num_tiles
    )
    lse_chunks = max(1, _LSE_BYTES // (4 * tile_rows * step_heads * step_tiles))
    span_tiles = min(step_tiles * lse_chunks, num_tiles)
    scores = _workspace(q, step_heads * step_tiles * tokens * columns)
    bests = _workspace(q, scores.numel() // SEGMENT.value)
    lse = _workspace(q, step_heads * span_tiles * tile_rows)
    factor = scale * math.log2(math.e)
    # A box holds windows without gaps between those of one block and the next.
    boxed = not strided and slots == per_block and can_use_tma(compressed)
    boxes = describe(compressed, tile["BLOCK_N"]) if boxed else None
    lse_boxed = can_use_tma(coarse)
    lse_boxes = describe(coarse, tile["BLOCK_N"]) if lse_boxed else None
    if (boxed or strided) and tile["HEADS"] > 2:
        # Another program side by side is worth more than another stage: on one H200 at 64K tokens
        # with 8 KV heads scores take 3.0 ms with two stages instead of 3.1, their log-sum-exp 0.7
        # instead of 0.8; with 2 KV heads scores take 2.05 with one, 2.2 with two.
        tile["num_stages"] = 1 if tile["HEADS"] >= 16 else 2
    of_tokens = {
        **sizes,
        "G": q.shape[1] // Hkv,
        "D": q.shape[3],
        "KERNEL_SIZE": kernel_size,
        "KERNEL_STRIDE": kernel_stride,
        "DENSE": num_selected * block_size,
    }
    shared = {**of_tokens, **tile}
    score: Any = score_kernel
    scoring = {**shared, "PER_BLOCK": per_block, "BEFORE": before, "SLOTS": slots, "USE_TMA": boxed}
    if strided:
        from infllm_flex_ops.selection.kernels.select_blocks.boxed_scores import (
            score_boxed_kernel as score,
        )

        boxes = describe_strided(compressed, tile["BLOCK_N"], per_block)
        scoring = {**of_tokens, "SLOTS": per_block, **_choose_strided(tile)}
    for head in range(0, B * Hkv, step_heads):
        heads = all_heads[head : head + step_heads]
        for row in range(first_scored, num_rows, step_tiles * tokens):
            turn = (row - first_scored) // (step_tiles * tokens) % lse_chunks
            if turn == 0:  # many chunks at once: a chunk alone would not fill the device
                span = range(num_rows)[row : row + span_tiles * tokens]
                lse_kernel[(triton.cdiv(len(span), tokens) * len(heads),)](
                    q,
                    compressed,
                    coarse,
                    lse_boxes,
                    lse,
                    table,
                    *q.stride(),
                    *compressed.stride(),
                    *coarse.stride(),
                    heads.start,
                    len(heads),
                    span.start,
                    span.stop,
                    offset,
                    compressed.shape[2],
                    coarse.shape[2],
                    factor,
                    Hkv,
                    parts.count,
                    parts.first,
                    COARSE_SIZE=coarse_size,
                    COARSE_STRIDE=coarse_stride,
                    USE_TMA=lse_boxed,
                    **shared,
                )
            rows = range(num_rows)[row : row + step_tiles * tokens]
            programs = triton.cdiv(len(rows), tokens) * len(heads)
            splits, split_blocks = split(columns, programs)
            score[(programs * splits,)](
                q,
                compressed,
                boxes,
                lse,
                scores,
                bests,
                table,
                *q.stride(),
                *compressed.stride(),
                heads.start,
                len(heads),
                rows.start,
                rows.stop,
                offset,
                compressed.shape[2],
                columns,
                split_blocks,
                splits,
                turn * step_tiles,
                triton.cdiv(len(span), tokens),
                factor,
                Hkv,
                parts.count,
                parts.first,
                LOCAL_BLOCKS=local_blocks,
                TAIL=tail,
                SEGMENT=SEGMENT.value if picker.count_segments(rows) else 0,
                **scoring,
            )
            picker.pick(scores, bests, heads, rows, columns)
    return out


def _can_stride(q: Tensor, compressed: Tensor, tile: dict[str, int]) -> bool:
    """Whether windows are scored one of every block at a time, in boxes: on Hopper, by Gluon.

    On one H100 at 64K tokens that takes 23 % less time with one head to a group, 14 with 4, 10
    with 7; a whole selection with 16 takes 3 % less on one H200, 5 at 128K.
    """
    fits = tile["BLOCK_D"] in (64, 128) and tile["HEADS"] <= 16 and q.element_size() == 2
    return fits and can_use_tma(compressed) and knows_gluon()


def _choose_strided(tile: dict[str, int]) -> dict[str, int | None]:
    """Choose the room of a program that scores windows one of every block at a time."""
    # Three programs side by side on a multiprocessor, or four where a tile's tokens, and so its
    # scores, are few; scores of many tokens take registers.
    ring, registers = (1, 128) if tile["HEADS"] == 16 else (2, 168)
    return {
        **{name: tile[name] for name in ("BLOCK_D", "HEADS", "TOKENS")},
        "RING": ring,
        "num_warps": 4,
        "maxnreg": registers if tile["HEADS"] > 1 else None,
    }


def _workspace(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _tile(q: Tensor, Hkv: int, slots: int) -> dict[str, int]:
    """Choose the tile by dtype, head dim and group alone, so that a row's bits never change."""
    heads = triton.next_power_of_2(q.shape[1] // Hkv)
    block_d = max(16, triton.next_power_of_2(q.shape[3]))
    if q.element_size() > 2:  # float32 without tensor cores: the tile must fit in registers
        rows, block_n, warps, stages = 32, 32, 8, 1
    elif block_d <= 128 and heads > 2:
        # Rows of many heads give few scores: there a third program is worth more than a third
        # stage.
        rows, block_n, warps, stages = 128, 64, 4, 2 if heads >= 16 else 3
    else:  # wide heads take registers, and so do the scores of many tokens
        rows, block_n, warps, stages = 64, 64, 4, 2 if block_d > 128 else 3
    rows = max(rows, heads)
    return {
        "HEADS": heads,
        "TOKENS": rows // heads,
        "BLOCK_N": max(block_n, slots),
        "BLOCK_D": block_d,
        "FP32": q.element_size() > 2,
        "num_warps": warps,
        "num_stages": stages,
    }
