"""Launches of every kernel at one shape, on tensors without memory, as the operators make them."""

from __future__ import annotations

import torch
from torch import Tensor

from infllm_flex_ops.block_lists.membership import count_words, word_dtype
from infllm_flex_ops.selection.rule import SelectionRule

HEAD_DIM, KV_HEADS, BLOCK = 128, 2, 64
_SELECTED, _SLOTS = 96, 128
_TOKENS = 65_536
_RULE = SelectionRule(32, 16, 128, 64, BLOCK, 1, 32, _SELECTED)
_BRAIN = torch.bfloat16
_INT = torch.int32


def _meta(*shape: int, dtype: torch.dtype = _BRAIN) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def select(G: int) -> None:
    """Launch selection of a whole sequence."""
    from infllm_flex_ops.selection.kernels import compress_keys
    from infllm_flex_ops.selection.kernels.prefill.launch import launch

    key = _meta(1, KV_HEADS, _TOKENS, HEAD_DIM)
    compress_keys.launch(key, _RULE.kernel_size, _RULE.kernel_stride)
    compressed, coarse = (
        _meta(1, KV_HEADS, (_TOKENS - size) // stride + 1, HEAD_DIM)
        for size, stride in ((32, 16), (128, 64))
    )
    query = _meta(1, KV_HEADS * G, _TOKENS, HEAD_DIM)
    launch(query, compressed, coarse, _TOKENS, _RULE, HEAD_DIM**-0.5)


def attend(G: int) -> None:
    """Launch lists, attention and its backward, in the tiles that their plans choose."""
    from infllm_flex_ops.block_attention.kernels import attend_blocks, attend_blocks_backward
    from infllm_flex_ops.block_lists.kernels import tile_blocks

    query, out, grad_out = (_meta(1, KV_HEADS * G, _TOKENS, HEAD_DIM) for _ in range(3))
    key, value = (_meta(1, KV_HEADS, _TOKENS, HEAD_DIM) for _ in range(2))
    selected = _meta(1, KV_HEADS, _TOKENS, _SELECTED, dtype=_INT)
    rest = BLOCK, HEAD_DIM**-0.5
    tokens = attend_blocks.choose_tile_tokens(G, key, BLOCK)
    tile_blocks.launch(selected, _TOKENS, BLOCK, tokens, _SLOTS, separate_full=False)
    attend_blocks.launch(query, key, value, *_lists(tokens), rest[0], tokens, rest[1])
    tokens = attend_blocks_backward.choose_tile_tokens(query, key)
    lse = _meta(1, KV_HEADS * G, _TOKENS, dtype=torch.float32)
    tensors = grad_out, query, key, value, out, lse
    attend_blocks_backward.launch(*tensors, *_lists(tokens), rest[0], tokens, rest[1], selected)


def _lists(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    tiles = 1, KV_HEADS, -(-_TOKENS // tokens)
    words = _meta(*tiles, _SLOTS * count_words(tokens), dtype=word_dtype(tokens))
    return _meta(*tiles, dtype=_INT), _meta(*tiles, _SLOTS, dtype=_INT), words


def decode(G: int) -> None:
    """Launch a decode step."""
    from infllm_flex_ops.block_attention.kernels import attend_cached_blocks
    from infllm_flex_ops.selection.kernels import append_windows
    from infllm_flex_ops.selection.kernels.decode.launch import launch

    query = _meta(1, KV_HEADS * G, 1, HEAD_DIM)
    key, value = (_meta(1, KV_HEADS, _TOKENS, HEAD_DIM) for _ in range(2))
    compressed, coarse = (_meta(1, KV_HEADS, _TOKENS // n, HEAD_DIM) for n in (16, 64))
    start, end = (_meta(1, dtype=torch.int64) for _ in range(2))
    append_windows.launch(key, compressed, coarse, start, end, None, None, 1, 32, 16, 128, 64)
    launch(query, compressed, coarse, start, end, _RULE, 8192, _SLOTS, HEAD_DIM**-0.5)
    selected = _meta(1, KV_HEADS, 1, _SLOTS, dtype=_INT)
    attend_cached_blocks.launch(query, key, value, selected, start, end, BLOCK, HEAD_DIM**-0.5)
