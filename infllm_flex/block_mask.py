"""Turn selected blocks into FlexAttention's BlockMask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import custom_ops
from infllm_flex.config import InfLLMConfig

_CPU_TILE_ROWS = 4  # FlexAttention's CPU code is as fast on 4 rows as on 64, with less union
_GPU_TILE_ROWS = 16  # the least that tensor cores take; more tokens a tile, more union
_MAX_TILE_TOKENS = 32  # a tile's tokens have one bit each in an int32 word


def choose_tile_tokens(num_groups: int, device: torch.device) -> int:
    """Choose how many tokens share a tile.

    A tile loads the union of its tokens' blocks, so few tokens mean little waste; too few rows
    leave the matrix units idle.

    Args:
        num_groups: Query heads per KV head, ``G``; a tile has tokens x G rows.
        device: Where attention runs.
    """
    rows = _GPU_TILE_ROWS if device.type == "cuda" else _CPU_TILE_ROWS
    if device.type == "cuda":
        tokens = 1  # rows must divide into matrix instructions of 16
        while tokens * num_groups % rows:
            tokens *= 2
        return tokens
    return -(-rows // num_groups)


def union_width(num_slots: int, tile_tokens: int, num_blocks: int) -> int:
    """Bound the blocks that a tile's tokens select together, whatever they are: a static size."""
    return torch.sym_min(num_blocks, tile_tokens * num_slots)


def build_block_mask(
    selected: Tensor,
    config: InfLLMConfig,
    *,
    kv_len: int,
    num_groups: int,
    first: int | None = None,
    tile_tokens: int | None = None,
    backward: bool = False,
) -> BlockMask:
    """Let every query see its selected blocks, causally, through FlexAttention.

    The query group is folded into the sequence: row ``token * G + head`` of a query
    ``[B, Hkv, Sq * G, D]``. Blocks that all tokens of a tile selected and see whole are listed as
    full; in the others ``mask_mod`` decides, which is exact by itself: FlexAttention gives the same
    result without the lists. No table of all (query, key) or (tile, block) pairs is made.

    Args:
        selected: int32 ``[B, Hkv, Sq, K]``, ascending, -1 for unused slots.
        config: Sparsity settings.
        kv_len: Keys in the sequence, ``Skv``.
        num_groups: Query heads per KV head, ``G``.
        first: Position of the first query. Defaults to ``Skv - Sq``: they are the last positions.
        tile_tokens: Tokens per tile, 1 to 32; ``None`` chooses by device and group.
        backward: Also list the tiles of each block, which FlexAttention's backward walks. Their
            rows are as wide as the number of tiles.

    Returns:
        A BlockMask of ``[B, Hkv, Sq * G, Skv]`` with ``BLOCK_SIZE = (tile_tokens * G, block_size)``.

    Raises:
        ValueError: ``selected`` is not int32 of four dimensions, or ``tile_tokens`` out of range.
    """
    if selected.dim() != 4 or selected.dtype != torch.int32:
        raise ValueError(
            f"selected must be int32 [B, Hkv, Sq, K], got {selected.dtype} "
            f"of shape {tuple(selected.shape)}"
        )
    if tile_tokens is None:
        tile_tokens = choose_tile_tokens(num_groups, selected.device)
    if not 1 <= tile_tokens <= _MAX_TILE_TOKENS:
        raise ValueError(f"tile_tokens must be between 1 and {_MAX_TILE_TOKENS}, got {tile_tokens}")
    Sq = selected.shape[2]
    num_blocks = (kv_len + config.block_size - 1) // config.block_size
    width = union_width(selected.shape[3], tile_tokens, num_blocks)
    first = kv_len - Sq if first is None else first
    kv_num, kv_idx, _, full_num, full_idx = custom_ops.tile_blocks(
        selected, first + Sq, config.block_size, tile_tokens, width
    )
    q_lists: dict[str, Tensor | None] = dict.fromkeys(
        ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
    )
    if backward:
        q_num, q_idx = custom_ops.transpose_blocks(kv_num, kv_idx, num_blocks)
        full_q_num, full_q_idx = custom_ops.transpose_blocks(full_num, full_idx, num_blocks)
        q_lists = dict(zip(q_lists, (q_num, q_idx, full_q_num, full_q_idx), strict=True))
    if selected.device.type == "cpu":
        kv_idx, full_idx = (_widen(idx, num_blocks) for idx in (kv_idx, full_idx))
    return BlockMask(
        seq_lengths=(Sq * num_groups, kv_len),
        kv_num_blocks=kv_num,
        kv_indices=kv_idx,
        full_kv_num_blocks=full_num,
        full_kv_indices=full_idx,
        **q_lists,
        BLOCK_SIZE=(tile_tokens * num_groups, config.block_size),
        mask_mod=_selected_and_causal(selected, config, first, num_groups),
    )


def _widen(idx: Tensor, num_blocks: int) -> Tensor:
    """View lists ``[B, Hkv, Nq, W]`` as ``[B, Hkv, Nq, num_blocks]`` without the memory.

    FlexAttention's CPU code insists on lists as wide as the sequence has blocks, and reads only
    the counted slots; so rows may run into the next one's.
    """
    B, Hkv, Nq, W = idx.shape
    flat = torch.nn.functional.pad(idx.reshape(-1), (0, num_blocks))
    return flat.as_strided((B, Hkv, Nq, num_blocks), (Hkv * Nq * W, Nq * W, W, 1))


def _selected_and_causal(
    selected: Tensor, config: InfLLMConfig, first: int, num_groups: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Make the exact ``mask_mod``: find the key's block in the token's ascending list."""
    slots = config.num_selected
    steps = [1 << bit for bit in reversed(range(slots.bit_length()))]
    block_size = config.block_size
    # A tensor, since a captured number that changes from call to call would be compiled anew.
    first_position = torch.full((1,), first, dtype=torch.int32, device=selected.device)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        token = q_idx // num_groups
        block = kv_idx // block_size
        last = selected.shape[3] - 1
        slot = torch.zeros_like(q_idx)
        for step in steps:  # binary search for the last slot that is not beyond the block
            ahead = (slot + step).clamp(max=last)
            candidate = selected[b, h, token, ahead]
            slot = torch.where((candidate >= 0) & (candidate <= block), ahead, slot)
        return (selected[b, h, token, slot] == block) & (kv_idx <= token + first_position[0])

    return mask_mod
