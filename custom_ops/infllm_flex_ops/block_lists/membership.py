"""Membership words: which tokens of a tile selected a block, one bit per token."""

import torch

MAX_TILE_TOKENS = 64  # the bits of the widest integer


def check_tile_tokens(tile_tokens: int) -> None:
    """Raise a ValueError unless a word has a bit for every token of a tile."""
    if not 1 <= tile_tokens <= MAX_TILE_TOKENS:
        raise ValueError(f"tile_tokens must be between 1 and {MAX_TILE_TOKENS}, got {tile_tokens}")


def count_words(tile_tokens: int) -> int:
    """Count the words of a slot. Lists that kernels build without full blocks may have two."""
    return 2 if MAX_TILE_TOKENS < tile_tokens <= 2 * MAX_TILE_TOKENS else 1


def word_dtype(tile_tokens: int) -> torch.dtype:
    """Return the integer type of the words of tiles of ``tile_tokens`` tokens.

    Raises:
        ValueError: Two integers have not so many bits.
    """
    check_tile_tokens(-(-tile_tokens // count_words(tile_tokens)))
    return torch.int32 if tile_tokens <= 32 else torch.int64
