"""Triton kernels of ``select_blocks_pooled``: a tile of pooled queries against runs of blocks."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.device import has_little_shared_memory, knows_float8
from infllm_flex_ops.selection.documents import check_documents
from infllm_flex_ops.selection.kernels.select_blocks.documents import locate_tile
from infllm_flex_ops.selection.kernels.select_blocks.pick import SEGMENT
from infllm_flex_ops.selection.kernels.select_blocks.picking import Picker, divide_into_parts
from infllm_flex_ops.selection.kernels.select_blocks.workspace import (
    MAX_BLOCKS,
    SCORE_BYTES,
    chunk,
    split,
)
from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.triton_common.dot_fp32 import dot_fp32

_MAX_SLOTS = 256  # windows of a block, which one step scores together
_VARYING = ["first_head", "num_heads", "first_row", "end_row", "offset", "C"]
_VARYING += ["split_blocks", "splits", "num_parts", "first_part"]


@triton.jit
def rank(logit):
    """Turn dot products into non-negative floats of the same order, as the definition does."""
    logit = tl.where(logit == logit, logit, -1e38)
    bits = tl.minimum(tl.maximum(logit, -1e38), 1e38).to(tl.int32, bitcast=True)
    bits = ((bits ^ (bits >> 31 & 0x7FFFFFFF)) >> 1) + (1 << 30)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=_VARYING)
def pooled_score_kernel(
    q_ptr,
    keys_ptr,
    scores_ptr,
    bests_ptr,
    documents_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    first_head,
    num_heads,
    first_row,
    end_row,
    offset,
    C,
    columns,
    split_blocks,
    splits,
    Hkv,
    num_parts,
    first_part,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    DENSE: tl.constexpr,
    PART: tl.constexpr,
    PART_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP32: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Fill ``scores [num_heads, rows, columns]`` and ``bests``, the best of every ``KEPT`` blocks.

    A program scores a run of blocks for a tile of tokens. Only blocks before each token's window
    count later, and those it sees whole: nothing is masked here.
    """
    PER_BLOCK: tl.constexpr = BLOCK_SIZE // WINDOW
    STEP: tl.constexpr = BLOCK_N // SLOTS
    tiles = tl.cdiv(end_row - first_row, TOKENS)
    head = tl.program_id(0) % num_heads
    part = tl.program_id(0) // num_heads % splits
    tile = tiles - 1 - tl.program_id(0) // num_heads // splits
    first = first_row + tile * TOKENS
    num_rows = end_row - first_row
    out_row = head.to(tl.int64) * num_rows + tile * TOKENS + tl.arange(0, TOKENS)
    b = ((first_head + head) // Hkv).to(tl.int64)
    h = ((first_head + head) % Hkv).to(tl.int64)
    dense = DENSE
    if PART > 0:
        first, begin, end_row, budget = locate_tile(
            documents_ptr + b * num_parts * 3, first, first_part, offset, PART, PART_ROWS
        )
        offset -= begin
        dense = budget * BLOCK_SIZE
        first_window = begin // WINDOW
        keys_ptr += first_window.to(tl.int64) * stride_ks
        C -= first_window
    last_position = offset + tl.minimum(first + TOKENS, end_row) - 1
    num_scored = last_position // BLOCK_SIZE - LOCAL_BLOCKS  # the blocks after these are forced
    if (last_position < dense) | (first >= end_row) | (part * split_blocks >= num_scored):
        return
    token = first + tl.arange(0, TOKENS)
    is_row = token < end_row
    d = tl.arange(0, BLOCK_D)
    q_ptr += b * stride_qb + h * stride_qh
    q_ptr += token.to(tl.int64)[:, None] * stride_qs
    if not FP32:
        q_mask = is_row[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + d[None, :] * stride_qd, mask=q_mask, other=0.0)

    keys_ptr += b * stride_kb + h * stride_kh
    n = tl.arange(0, BLOCK_N)
    slot = n % SLOTS
    block_slot = tl.arange(0, STEP)
    out = out_row[:, None] * columns + block_slot[None, :]
    first_block = part * split_blocks
    end_block = tl.minimum(first_block + split_blocks, num_scored)
    best = tl.full([TOKENS], 0.0, tl.float32)
    for start in tl.range(first_block, end_block, STEP):
        window = (start + n // SLOTS) * PER_BLOCK + slot
        valid = (window < C) & (slot < PER_BLOCK)
        key_ptr = keys_ptr + window.to(tl.int64)[None, :] * stride_ks
        if FP32:
            logits = dot_fp32(
                q_ptr,
                is_row[:, None],
                stride_qd,
                key_ptr,
                valid[None, :],
                stride_kd,
                D,
                BLOCK_D,
            )
        else:
            mask = valid[None, :] & (d < D)[:, None]
            keys = tl.load(key_ptr + d[:, None] * stride_kd, mask=mask, other=0.0)
            logits = tl.dot(q, keys)
        if SLOTS != PER_BLOCK:
            logits = tl.where((slot < PER_BLOCK)[None, :], logits, float("-inf"))
        score = rank(tl.max(tl.reshape(logits, [TOKENS, STEP, SLOTS]), 2))
        block = start + block_slot
        listed = is_row[:, None] & (block < end_block)[None, :]
        tl.store(scores_ptr + out + start, score, mask=listed)
        best = tl.where(start % KEPT == 0, 0.0, best)
        best = tl.maximum(best, tl.max(score, 1))
        ends = ((start + STEP) % KEPT == 0) | (start + STEP >= end_block)
        at = (out_row * columns + start) // KEPT
        tl.store(bests_ptr + at, best, mask=is_row & ends)


def launch(
    q: Tensor,
    compressed: Tensor,
    kv_len: int,
    rule: SelectionRule,
    documents: Tensor | None = None,
) -> Tensor:
    """Fill the rows that take every block directly; score and pick the others chunk by chunk."""
    check_documents(documents, kv_len, q.shape[2])
    window, block_size, init_blocks, local_blocks, num_selected = rule.pooled
    B, Hkv, Sq, D = q.shape
    num_blocks = triton.cdiv(kv_len, block_size)
    _check_size(num_blocks, block_size, window)
    K = min(num_selected, num_blocks)
    out = torch.empty(B, Hkv, Sq, K, dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out
    if q.element_size() == 1 and not knows_float8(q):
        # These GPUs know no float8; half precision holds e4m3 exactly.
        q, compressed = q.half(), compressed.half()
    offset = kv_len - Sq
    tile = _choose_tile(q, triton.next_power_of_2(block_size // window))
    tokens = tile["TOKENS"]
    documents = None if documents is None else documents.contiguous()
    parts = divide_into_parts(documents, kv_len, offset, tokens)
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
        keeps_bests=True,
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
    row_bytes = 4 * (columns + columns // SEGMENT.value)
    step_heads, step_tiles = chunk(SCORE_BYTES, row_bytes * tokens, B * Hkv, num_tiles)
    num_scores = step_heads * step_tiles * tokens * columns
    scores = torch.empty(num_scores, dtype=torch.float32, device=q.device)
    bests = torch.empty(num_scores // SEGMENT.value, dtype=torch.float32, device=q.device)
    for head in range(0, B * Hkv, step_heads):
        heads = all_heads[head : head + step_heads]
        for row in range(first_scored, num_rows, step_tiles * tokens):
            rows = range(num_rows)[row : row + step_tiles * tokens]
            programs = triton.cdiv(len(rows), tokens) * len(heads)
            splits, split_blocks = split(columns, programs)
            pooled_score_kernel[(programs * splits,)](
                q,
                compressed,
                scores,
                bests,
                out if documents is None else documents,
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
                Hkv,
                parts.count,
                parts.first,
                D=D,
                WINDOW=window,
                BLOCK_SIZE=block_size,
                LOCAL_BLOCKS=local_blocks,
                DENSE=num_selected * block_size,
                PART=parts.size,
                PART_ROWS=parts.rows,
                KEPT=SEGMENT.value,
                **tile,
            )
            picker.pick(scores, bests, heads, rows, columns)
    return out


def _check_size(num_blocks: int, block_size: int, window: int) -> None:
    if num_blocks > MAX_BLOCKS:
        raise NotImplementedError(
            f"select_blocks_pooled handles at most {MAX_BLOCKS} blocks on CUDA, got {num_blocks}: "
            f"use a larger block_size"
        )
    if block_size // window > _MAX_SLOTS:
        raise NotImplementedError(
            f"select_blocks_pooled handles at most {_MAX_SLOTS} windows to a block on CUDA, got "
            f"{block_size // window}: use a smaller block_size or a larger kernel_size"
        )


def _choose_tile(q: Tensor, slots: int) -> dict[str, Any]:
    """Choose a program's tile by dtype, head dim and GPU, never by length or batch."""
    block_d = max(16, triton.next_power_of_2(q.shape[3]))
    if q.element_size() > 2:  # float32 without tensor cores: the tile must fit in registers
        tokens, block_n, warps, stages = 32, 32, 8, 1
    elif q.element_size() == 1 or block_d <= 64:
        tokens, block_n, warps, stages = 128, 128, 8, 3
    else:
        tokens, block_n, warps, stages = 64, 128, 4, 3
    if block_d * q.element_size() > 256 or has_little_shared_memory(q):
        stages = min(stages, 2)
    return {
        "SLOTS": slots,
        "BLOCK_D": block_d,
        "TOKENS": tokens,
        # A step holds whole blocks, at most a segment of them.
        "BLOCK_N": max(min(block_n, SEGMENT.value * slots), slots),
        "FP32": q.element_size() > 2,
        "num_warps": warps,
        "num_stages": stages,
    }
