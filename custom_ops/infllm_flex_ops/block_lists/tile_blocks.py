"""List the blocks that the tokens of a tile selected, for kernels that walk such lists."""

import torch
import torch.nn.functional as F
from torch import Tensor

from infllm_flex_ops.block_lists.membership import check_tile_tokens, count_words, word_dtype
from infllm_flex_ops.dispatch import cuda_launcher, define_operator
from infllm_flex_ops.sizes import ceil_div
from infllm_flex_ops.transforms import register_vmap

_CHUNK_ENTRIES = 4 << 20  # (tile, block) pairs looked at together; bounds memory at any length


@define_operator()
def tile_blocks(
    selected: Tensor,
    kv_len: int,
    block_size: int,
    tile_tokens: int,
    width: int,
    separate_full: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """List the union of each tile's selected blocks; separate those that need no mask.

    A block is *full* for a tile if all tokens of the tile selected it and see all its keys. Other
    blocks are *partial*: a membership word says which tokens selected them, and the causal test
    still applies. A token's blocks that begin after it are ignored.

    Args:
        selected: int32 ``[B, Hkv, Sq, K]``, ascending, -1 for unused slots.
        kv_len: Keys in the sequence; the queries are its last ``Sq`` positions.
        block_size: Keys per block.
        tile_tokens: Tokens per tile, 1 to 64. The last tile may hold fewer.
        width: Slots per list, at least the size of the largest union.
        separate_full: Whether full blocks have a list of their own; else one list holds all.

    Returns:
        Five tensors, int32 except ``words``; lists ascend and are zero past their counts.
        ``kv_num [B, Hkv, Nq]`` and ``kv_idx [B, Hkv, Nq, width]``: the partial blocks.
        ``words [B, Hkv, Nq, width]``: bit t is set if token t of the tile selected that block;
        int32 for tiles of up to 32 tokens, else int64. On CUDA tiles may hold up to 128 tokens if
        full blocks are not separate: then ``words [B, Hkv, Nq, 2 * width]`` are those of the first
        64 tokens, and after them those of the others.
        ``full_num [B, Hkv, Nq]`` and ``full_idx [B, Hkv, Nq, width]``: the full blocks. Unless they
        are separate, the counts are 0 and the width is 0.

    Raises:
        ValueError: ``tile_tokens`` is out of range.
    """
    dtype = word_dtype(tile_tokens)
    check_tile_tokens(tile_tokens)
    if tile_tokens == 1 and separate_full:
        return _split_own_lists(selected, kv_len, block_size, width)
    B, Hkv, Sq, _ = selected.shape
    num_tiles = ceil_div(Sq, tile_tokens)
    rows = B * Hkv * num_tiles
    kv_num, full_num = (selected.new_zeros(rows) for _ in range(2))
    full_width = width if separate_full else 0
    kv_idx = selected.new_zeros(rows, width)
    words = selected.new_zeros(rows, width, dtype=dtype)
    full_idx = selected.new_zeros(rows, full_width)
    num_blocks = ceil_div(kv_len, block_size)
    per_chunk = max(1, _CHUNK_ENTRIES // num_blocks)
    flat = selected.reshape(B * Hkv, Sq, -1)
    for head in range(B * Hkv):
        for tile in range(0, num_tiles, per_chunk):
            last = min(tile + per_chunk, num_tiles)
            tokens = flat[head, tile * tile_tokens : last * tile_tokens]
            first = kv_len - Sq + tile * tile_tokens
            part, full, members = _unite(tokens, first, num_blocks, block_size, tile_tokens)
            at = slice(head * num_tiles + tile, head * num_tiles + last)
            listed = part if separate_full else part | full
            _list_blocks(listed, kv_num[at], kv_idx[at], members, words[at])
            if separate_full:
                _list_blocks(full, full_num[at], full_idx[at])
    shape = (B, Hkv, num_tiles)
    return (
        kv_num.view(shape),
        kv_idx.view(*shape, width),
        words.view(*shape, width),
        full_num.view(shape),
        full_idx.view(*shape, full_width),
    )


register_vmap(tile_blocks)


@tile_blocks.register_fake
def _(
    selected: Tensor,
    kv_len: int,
    block_size: int,
    tile_tokens: int,
    width: int,
    separate_full: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, Hkv, Sq, _ = selected.shape
    num_tiles = ceil_div(Sq, tile_tokens)
    num = selected.new_empty(B, Hkv, num_tiles)
    idx = selected.new_empty(B, Hkv, num_tiles, width)
    full_idx = selected.new_empty(B, Hkv, num_tiles, width if separate_full else 0)
    words_width = width * count_words(tile_tokens)
    words = selected.new_empty(B, Hkv, num_tiles, words_width, dtype=word_dtype(tile_tokens))
    return num, idx, words, torch.empty_like(num), full_idx


cuda_launcher(tile_blocks, "block_lists.kernels.tile_blocks")


def _split_own_lists(
    selected: Tensor, kv_len: int, block_size: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Split each token's ascending list before the first block that it does not see whole."""
    Sq, K = selected.shape[2:]
    position = torch.arange(kv_len - Sq, kv_len, device=selected.device)[:, None]
    chosen = (selected >= 0) & (selected * block_size <= position)
    full_num = (chosen & ((selected + 1) * block_size - 1 <= position)).sum(-1, dtype=torch.int32)
    kv_num = chosen.sum(-1, dtype=torch.int32) - full_num
    slot = torch.arange(width, device=selected.device)
    slots = F.pad(selected, (0, max(0, width - K)))[..., :width]
    full_idx = slots.masked_fill(slot >= full_num[..., None], 0)
    rest = (slot + full_num[..., None]).clamp_(max=width - 1)
    is_rest = slot < kv_num[..., None]
    kv_idx = slots.gather(-1, rest.long()).masked_fill_(~is_rest, 0)
    return kv_num, kv_idx, is_rest.int(), full_num, full_idx


def _unite(
    tokens: Tensor, first: int, num_blocks: int, block_size: int, tile_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Classify every block for tiles of ``tokens [T, K]`` from position ``first``.

    Returns:
        ``partial`` and ``full``, bool ``[tiles, num_blocks]``, and ``members``, int64 words.
    """
    T = tokens.shape[0]
    num_tiles = ceil_div(T, tile_tokens)
    token = torch.arange(T, device=tokens.device)
    tile = token // tile_tokens
    bit = torch.ones_like(token) << (token - tile * tile_tokens)
    # A token lists a block at most once, so that adding its bit sets it. An extra column takes -1.
    members = bit.new_zeros(num_tiles * (num_blocks + 1))
    unchosen = (tokens < 0) | (tokens * block_size > (first + token)[:, None])
    column = torch.where(unchosen, num_blocks, tokens) + (tile * (num_blocks + 1))[:, None]
    members.index_add_(0, column.flatten(), bit[:, None].expand_as(tokens).reshape(-1))
    members = members.view(num_tiles, num_blocks + 1)[:, :num_blocks]

    everyone = bit.new_zeros(num_tiles).index_add_(0, tile, bit)
    tile_first = first + torch.arange(num_tiles, device=tokens.device) * tile_tokens
    block_last = torch.arange(1, num_blocks + 1, device=tokens.device) * block_size - 1
    full = (members == everyone[:, None]) & (block_last <= tile_first[:, None])
    return (members != 0) & ~full, full, members


def _list_blocks(
    marked: Tensor,
    num: Tensor,
    idx: Tensor,
    members: Tensor | None = None,
    words: Tensor | None = None,
) -> None:
    """Write the marked columns of ``[tiles, num_blocks]`` into ascending lists, in place."""
    tile, block = marked.nonzero(as_tuple=True)
    counts = marked.sum(-1)
    starts = counts.cumsum(0) - counts
    slot = torch.arange(len(tile), device=tile.device) - starts[tile]
    num.copy_(counts)
    idx[tile, slot] = block.int()
    if members is not None and words is not None:
        # Narrowing keeps the highest bit as the sign, as kernels expect.
        words[tile, slot] = members[tile, block].to(words.dtype)
