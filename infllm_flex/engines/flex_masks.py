"""Turn selected blocks into FlexAttention's BlockMask."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import infllm_flex_ops
from infllm_flex.config import InfLLMConfig
from infllm_flex.validation import require_ascending
from infllm_flex_ops import torch_private
from infllm_flex_ops.block_lists.membership import check_tile_tokens
from infllm_flex_ops.block_lists.union_lists import union_width
from infllm_flex_ops.sizes import ceil_div

_MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_CPU_TILE_ROWS = 4  # FlexAttention's CPU code gains nothing from more, and unions would grow
_GPU_TILE_ROWS = 16  # the fewest that tensor cores take; more tokens a tile, larger unions


def choose_tile_tokens(num_groups: int, device: torch.device) -> int:
    """Choose the tokens per tile.

    A tile loads the union of its tokens' blocks. Few tokens waste little of it; too few rows leave
    the matrix units idle.

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
    return ceil_div(rows, num_groups)


def build_block_mask(
    selected: Tensor,
    config: InfLLMConfig,
    *,
    kv_len: int,
    num_groups: int,
    q_offset: int | None = None,
    tile_tokens: int | None = None,
    backward: bool = False,
) -> BlockMask:
    """Build the BlockMask by which every query sees its selected blocks, causally.

    The query group is folded into the sequence: row ``token * G + head`` of a query
    ``[B, Hkv, Sq * G, D]``. Blocks that all tokens of a tile selected and see whole are listed as
    full. In the others ``mask_mod`` decides; it is exact by itself, so FlexAttention gives the same
    result without the lists. No table of all (query, key) or (tile, block) pairs is made.

    On a CPU without AVX-512, ``flex_attention`` compiled by PyTorch 2.13 is wrong for blocks of 8,
    24, 40... keys, whatever the mask. The engines of ``infllm_attention`` avoid it there.

    Args:
        selected: int32 ``[B, Hkv, Sq, K]``, ascending, -1 for unused slots.
        config: Sparsity settings.
        kv_len: Keys in the sequence, ``Skv``.
        num_groups: Query heads per KV head, ``G``.
        q_offset: Position of the first query. Defaults to ``Skv - Sq``: the queries are the last
            positions.
        tile_tokens: Tokens per tile, 1 to 64; None chooses by device and group.
        backward: Also list the tiles of each block, which FlexAttention's backward walks. These
            lists are as wide as the number of tiles.

    Returns:
        A BlockMask of ``[B, Hkv, Sq * G, Skv]``, ``BLOCK_SIZE = (tile_tokens * G, block_size)``.

    Raises:
        ValueError: ``selected`` is not int32 of four dimensions or is empty, or a number is out of
            range. Blocks that do not ascend, where reading does not wait for a device.
    """
    if selected.dim() != 4 or selected.dtype != torch.int32 or 0 in selected.shape:
        raise ValueError(
            f"selected must be int32 [B, Hkv, Sq, K], got {selected.dtype} "
            f"of shape {tuple(selected.shape)}"
        )
    return make_block_mask(
        require_ascending(selected),
        config,
        kv_len=kv_len,
        num_groups=num_groups,
        q_offset=q_offset,
        tile_tokens=tile_tokens,
        backward=backward,
    )


def make_block_mask(
    selected: Tensor,
    config: InfLLMConfig,
    *,
    kv_len: int,
    num_groups: int,
    q_offset: int | None = None,
    tile_tokens: int | None = None,
    backward: bool = False,
) -> BlockMask:
    """Build the same mask from lists that are known to be in order."""
    if num_groups < 1:
        raise ValueError(f"num_groups must be 1 or more, got {num_groups}")
    if tile_tokens is None:
        tile_tokens = choose_tile_tokens(num_groups, selected.device)
    check_tile_tokens(tile_tokens)
    Sq = selected.shape[2]
    num_blocks = ceil_div(kv_len, config.block_size)
    width = union_width(selected.shape[3], tile_tokens, num_blocks)
    q_offset = kv_len - Sq if q_offset is None else q_offset
    if not 0 <= q_offset < kv_len:
        raise ValueError(
            f"the first query must stand at one of the kv_len = {kv_len} keys, got position "
            f"{q_offset} for {Sq} queries"
        )
    kv_num, kv_idx, _, full_num, full_idx = infllm_flex_ops.tile_blocks(
        selected, q_offset + Sq, config.block_size, tile_tokens, width
    )
    partial_tiles = full_tiles = torch_private.NO_LISTS
    if backward:
        partial_tiles = infllm_flex_ops.transpose_blocks(kv_num, kv_idx, num_blocks)
        full_tiles = infllm_flex_ops.transpose_blocks(full_num, full_idx, num_blocks)
    if selected.device.type == "cpu":
        kv_idx, full_idx = (_widen(idx, num_blocks) for idx in (kv_idx, full_idx))
    return torch_private.block_mask(
        (Sq * num_groups, kv_len),
        (tile_tokens * num_groups, config.block_size),
        _selected_and_causal(selected, q_offset, num_groups, config.block_size, num_blocks),
        kv=(kv_num, kv_idx),
        full_kv=(full_num, full_idx),
        q=partial_tiles,
        full_q=full_tiles,
    )


def _widen(idx: Tensor, num_blocks: int) -> Tensor:
    """View lists ``[B, Hkv, Nq, W]`` as ``[B, Hkv, Nq, num_blocks]`` without the memory.

    FlexAttention's CPU code requires lists as wide as the sequence has blocks but reads only the
    counted slots, so a row may overlap the next one.
    """
    B, Hkv, Nq, W = idx.shape
    flat = F.pad(idx.reshape(-1), (0, num_blocks))
    return flat.as_strided((B, Hkv, Nq, num_blocks), (Hkv * Nq * W, Nq * W, W, 1))


def _selected_and_causal(
    selected: Tensor, q_offset: int, num_groups: int, block_size: int, num_blocks: int
) -> _MaskMod:
    """Make the exact ``mask_mod``: the token selected the key's block, and the key is not ahead.

    On GPUs it serves small groups only (`FlexUnderOneMask`); larger ones need no bit test.
    """
    directory, words = _pack_selection(selected, num_blocks)
    # A tensor: a captured number would be compiled into the graph, and again for every new value.
    first_position = torch.full((1,), q_offset, dtype=torch.int32, device=selected.device)
    last_word = selected.shape[3] - 1

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        token = q_idx // num_groups
        block = kv_idx // block_size
        bit = (block >> 4) & 15
        entry = directory[b, h, token, block >> 8]
        word = (entry >> 16) + _count_bits((entry << (16 - bit)) & 0xFFFF)
        members = words[b, h, token, word.clamp(max=last_word)]
        chosen = (entry >> bit) & (members >> (block & 15)) & 1
        return (chosen != 0) & (kv_idx <= token + first_position[0])

    return mask_mod


def _pack_selection(selected: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Pack ``selected [B, Hkv, Sq, K]`` so that two look-ups tell if a block is selected.

    A bit per (token, block) would be a table of all pairs. Instead, 16 blocks form a word, which is
    stored only if a bit of it is set, and 16 words have one entry in a directory: which of them are
    stored (low half), and how many stored words precede them (high half).

    Returns:
        ``directory`` int32 ``[B, Hkv, Sq, ceil(Nkv / 256)]`` and ``words`` int32
        ``[B, Hkv, Sq, K]``, of which 16 bits are used, so that no shift meets the sign bit.
    """
    chosen = selected >= 0
    group = selected >> 4
    opens = chosen & (group != F.pad(group[..., :-1], (1, 0), value=-1))
    word = (opens.cumsum(-1) - 1).clamp_(min=0)
    bits = chosen.int() << (selected & 15)
    words = torch.zeros_like(selected).scatter_add_(-1, word, bits)

    entry = (group >> 4).clamp_(min=0).long()
    shape = (*selected.shape[:3], (num_blocks + 255) // 256)
    kept = selected.new_zeros(shape).scatter_add_(-1, entry, opens.int() << (group & 15))
    count = selected.new_zeros(shape).scatter_add_(-1, entry, opens.int())
    preceding = count.cumsum(-1, dtype=torch.int32) - count
    return kept | preceding << 16, words


def _count_bits(x: Tensor) -> Tensor:
    """Count the set bits of 16-bit numbers, pairs first, then fours, then eights."""
    x = x - ((x >> 1) & 0x5555)
    x = (x & 0x3333) + ((x >> 2) & 0x3333)
    x = (x + (x >> 4)) & 0x0F0F
    return (x * 0x0101 >> 8) & 31
