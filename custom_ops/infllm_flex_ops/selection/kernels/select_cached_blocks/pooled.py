"""Triton kernels of ``select_cached_blocks_pooled``: score by pooled queries, then pick."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllm_flex_ops.device import has_little_shared_memory, knows_float8
from infllm_flex_ops.selection.kernels.pool_queries import (
    average_heads,
    fit_float8,
    round_like_float8,
)
from infllm_flex_ops.selection.kernels.select_blocks.pooled import rank
from infllm_flex_ops.selection.kernels.select_blocks.workspace import MAX_BLOCKS
from infllm_flex_ops.selection.kernels.select_cached_blocks.pick import pick_cached
from infllm_flex_ops.selection.rule import SelectionRule

_PROGRAMS = 512  # as many as a GPU holds at a time: a second wave would wait for the first
_MAX_SLOTS = 256  # windows of a block, which one step scores together


@triton.jit(do_not_specialize=["n", "C", "columns", "split_blocks", "dense_len"])
def cached_pooled_score_kernel(
    q_ptr,
    keys_ptr,
    start_ptr,
    end_ptr,
    scores_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    n,
    C,
    columns,
    split_blocks,
    dense_len,
    Hkv,
    G: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    FITTING: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLOAT8: tl.constexpr,
    HAS_FLOAT8: tl.constexpr,
):
    """Fill ``scores [B * Hkv, n, columns]``, a run of blocks each.

    Only blocks before each token's window count later, and those it sees whole.
    """
    PER_BLOCK: tl.constexpr = BLOCK_SIZE // WINDOW
    STEP: tl.constexpr = BLOCK_N // SLOTS
    head = tl.program_id(1)
    tile = tl.program_id(2)
    b = (head // Hkv).to(tl.int64)
    h = (head % Hkv).to(tl.int64)
    begin = tl.load(start_ptr + b)
    length = (tl.load(end_ptr + b) - begin).to(tl.int32)
    last = length - n + tl.minimum(tile * TOKENS + TOKENS, n) - 1
    first_block = tl.program_id(0) * split_blocks
    num_scored = last // BLOCK_SIZE - LOCAL_BLOCKS  # the blocks after these are forced
    if (last + 1 < dense_len) | (last < FITTING) | (first_block >= num_scored):
        return
    token = tile * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, BLOCK_D)
    q_ptr += b * stride_qb + h * G * stride_qh
    q_ptr += token.to(tl.int64)[:, None] * stride_qs + d[None, :] * stride_qd
    q = average_heads(q_ptr, stride_qh, (token < n)[:, None] & (d < D)[None, :], G)
    if FLOAT8:
        q = round_like_float8(fit_float8(q)).to(tl.float16)
    else:
        q = q.to(keys_ptr.dtype.element_ty)

    keys_ptr += b * stride_kb + h * stride_kh
    if WINDOW == 1:  # the cache of keys itself
        keys_ptr += begin * stride_ks
        C -= begin.to(tl.int32)
    at = (head.to(tl.int64) * n + token) * columns
    i = tl.arange(0, BLOCK_N)
    slot = i % SLOTS
    for start in range(first_block, tl.minimum(first_block + split_blocks, num_scored), STEP):
        window = (start + i // SLOTS) * PER_BLOCK + slot
        valid = (window < C) & (slot < PER_BLOCK)
        key_ptr = keys_ptr + window.to(tl.int64)[None, :] * stride_ks + d[:, None] * stride_kd
        keys = tl.load(key_ptr, mask=valid[None, :] & (d < D)[:, None], other=0.0)
        if FLOAT8:
            if HAS_FLOAT8:  # conversion by the device rounds alike
                keys = keys.to(tl.float8e4nv).to(tl.float16)
            else:
                keys = round_like_float8(keys.to(tl.float32)).to(tl.float16)
        logits = tl.dot(q, keys, input_precision="ieee")
        if SLOTS != PER_BLOCK:
            logits = tl.where((slot < PER_BLOCK)[None, :], logits, float("-inf"))
        score = rank(tl.max(tl.reshape(logits, [TOKENS, STEP, SLOTS]), 2))
        block = start + tl.arange(0, STEP)
        mask = (token < n)[:, None] & ((block < num_scored) & (block < columns))[None, :]
        tl.store(scores_ptr + at[:, None] + block[None, :], score, mask=mask)


def launch(
    q: Tensor,
    compressed: Tensor,
    start: Tensor,
    end: Tensor,
    rule: SelectionRule,
    dense_len: int,
    width: int,
    float8: bool,
) -> Tensor:
    """Score and pick: two launches, which nothing but the device's own counters steers."""
    window, block_size, init_blocks, local_blocks, num_selected = rule.pooled
    B, Hq, n, D = q.shape
    Hkv, C = compressed.shape[1:3]
    blocks = triton.cdiv(C * window, block_size)
    columns = max(0, blocks - local_blocks)  # those that may lie before a query's window
    slots = triton.next_power_of_2(block_size // window)
    if columns > MAX_BLOCKS or slots > _MAX_SLOTS:
        raise NotImplementedError(
            f"select_cached_blocks_pooled handles at most {MAX_BLOCKS} blocks beside the window "
            f"and {_MAX_SLOTS} windows to a block on CUDA, got {columns} and "
            f"{block_size // window}: use another block_size"
        )
    out = torch.empty(B, Hkv, n, width, dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out
    scores = torch.empty(B * Hkv, n, max(columns, 1), dtype=torch.float32, device=q.device)
    if columns and blocks >= num_selected:
        tile = _choose_tile(q, compressed, slots, float8)
        tiles = triton.cdiv(n, tile["TOKENS"])
        step = tile["BLOCK_N"] // slots
        split_blocks = step * triton.cdiv(columns * B * Hkv * tiles, step * _PROGRAMS)
        cached_pooled_score_kernel[(triton.cdiv(columns, split_blocks), B * Hkv, tiles)](
            q,
            compressed,
            start,
            end,
            scores,
            *q.stride(),
            *compressed.stride(),
            n,
            C,
            columns,
            split_blocks,
            dense_len,
            Hkv,
            G=Hq // Hkv,
            D=D,
            WINDOW=window,
            BLOCK_SIZE=block_size,
            LOCAL_BLOCKS=local_blocks,
            FITTING=num_selected * block_size,
            SLOTS=slots,
            FLOAT8=float8,
            HAS_FLOAT8=knows_float8(q),
            **tile,
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


def _choose_tile(q: Tensor, compressed: Tensor, slots: int, float8: bool) -> dict[str, Any]:
    """Choose as many rows as a matrix instruction takes, and more tokens where there are more."""
    wide = compressed.element_size() > 2
    block_d = max(16, triton.next_power_of_2(q.shape[3]))
    most = 16 if wide or block_d > 128 else 64
    stages = 1 if wide else 2 if block_d > 128 or has_little_shared_memory(q) else 3
    return {
        "TOKENS": max(16, min(triton.next_power_of_2(q.shape[2]), most)),
        "BLOCK_N": max(32 if wide else 64, slots),
        "BLOCK_D": block_d,
        "num_warps": 8 if wide else 4,
        "num_stages": stages,
    }
