"""Score the blocks of a decode step by pooled queries."""

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.decode.tiles import selects_nothing
from infllm_flex_ops.selection.kernels.online_softmax import count_windows
from infllm_flex_ops.selection.kernels.pool_queries import (
    average_heads,
    fit_float8,
    round_like_float8,
)
from infllm_flex_ops.selection.kernels.prefill.pooled_scores import rank
from infllm_flex_ops.selection.kernels.rotary_dims import slowest_dim
from infllm_flex_ops.triton_common.dependent_launch import wait_for_previous
from infllm_flex_ops.triton_common.pages import (
    count_queries,
    step_offset,
    view_keys,
    view_queries,
)


@triton.jit(do_not_specialize=["n", "C", "columns", "split_blocks", "dense_len"])
def cached_pooled_score_kernel(
    q,
    keys,
    pages,
    start_ptr,
    end_ptr,
    scores_ptr,
    n,
    C,
    columns,
    split_blocks,
    dense_len,
    Hkv,
    RULE: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    IS_CACHE: tl.constexpr,
    FLOAT8: tl.constexpr,
    HAS_FLOAT8: tl.constexpr,
    PAGING: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Fill ``scores [B * Hkv, n, columns]``, a run of blocks each.

    Only blocks before each token's local blocks are used later, and each token sees those whole:
    nothing is masked here. Queries have ``HEAD_DIM`` dims and keys ``TILE.D``, the slowest of them.
    """
    STEP: tl.constexpr = TILE.BLOCK_N // WINDOWS.SLOTS
    STEP_WINDOWS: tl.constexpr = STEP * WINDOWS.PER_BLOCK
    head = tl.program_id(1)
    tile = tl.program_id(2)
    b = (head // Hkv).to(tl.int64)
    h = (head % Hkv).to(tl.int64)
    wait_for_previous(OVERLAP)
    row_start = 0
    if start_ptr is not None:
        row_start = tl.load(start_ptr + b)
    length = (tl.load(end_ptr + b) - row_start).to(tl.int32)
    num = count_queries(pages, b, n)
    last = length - num + tl.minimum(tile * TILE.TOKENS + TILE.TOKENS, num) - 1
    first_block = tl.program_id(0) * split_blocks
    num_scored = last // RULE.block_size - RULE.local_blocks  # later blocks are forced
    is_idle = selects_nothing(pages, tile, num, last, dense_len, RULE, TILE)
    if is_idle | (first_block >= num_scored):
        return
    q = view_queries(q, pages, b)
    token = tile * TILE.TOKENS + tl.arange(0, TILE.TOKENS)
    d = tl.arange(0, TILE.BLOCK_D)
    q_ptr = q.ptr + (b * q.b + h * TILE.G * q.h)
    q_ptr += token.to(tl.int64)[:, None] * q.s + slowest_dim(d, TILE.D, HEAD_DIM)[None, :] * q.d
    q_mask = (token < num)[:, None] & (d < TILE.D)[None, :]
    x = average_heads(q_ptr, q.h, q_mask, TILE.G)
    if FLOAT8:
        x = round_like_float8(fit_float8(x)).to(tl.float16)
    else:
        x = x.to(keys.ptr.dtype.element_ty)

    keys = view_keys(keys, pages, b, h)
    keys_ptr = keys.ptr
    table = None
    if pages is not None:
        C = count_windows(length - 1, RULE.kernel_size, RULE.kernel_stride, C)  # those written
        table = pages.table + b * pages.row
    elif IS_CACHE:
        keys_ptr += row_start * keys.s
        C -= row_start.to(tl.int32)
    at = (head.to(tl.int64) * n + token) * columns
    i = tl.arange(0, TILE.BLOCK_N)
    slot = i % WINDOWS.SLOTS
    for start in range(first_block, tl.minimum(first_block + split_blocks, num_scored), STEP):
        first = start * WINDOWS.PER_BLOCK
        window = (start + i // WINDOWS.SLOTS) * WINDOWS.PER_BLOCK + slot
        valid = (window < C) & (slot < WINDOWS.PER_BLOCK)
        offset = step_offset(keys, first, window, C, table, PAGING, STEP_WINDOWS)
        key_ptr = keys_ptr + offset[None, :] + d[:, None] * keys.d
        k = tl.load(key_ptr, mask=valid[None, :] & (d < TILE.D)[:, None], other=0.0)
        if FLOAT8:
            if k.dtype == tl.float8e4nv:
                k = k.to(tl.float16)
            elif HAS_FLOAT8:  # the device rounds in the same way
                k = k.to(tl.float8e4nv).to(tl.float16)
            else:
                k = round_like_float8(k.to(tl.float32)).to(tl.float16)
        logits = tl.dot(x, k, input_precision="ieee")
        if WINDOWS.SLOTS != WINDOWS.PER_BLOCK:
            logits = tl.where((slot < WINDOWS.PER_BLOCK)[None, :], logits, float("-inf"))
        score = rank(tl.max(tl.reshape(logits, [TILE.TOKENS, STEP, WINDOWS.SLOTS]), 2))
        block = start + tl.arange(0, STEP)
        mask = (token < num)[:, None] & ((block < num_scored) & (block < columns))[None, :]
        tl.store(scores_ptr + at[:, None] + block[None, :], score, mask=mask)
