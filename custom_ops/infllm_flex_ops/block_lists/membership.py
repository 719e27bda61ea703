"""Membership words: which tokens of a tile selected a block, one bit per token."""

import torch

MAX_TILE_TOKENS = 64  # the bits of the widest integer


def check_tile_tokens(tile_tokens: int) -> None:
    """Raise a ValueError unless a word has a bit for every token of a tile."""
    if not 1 <= tile_tokens <= MAX_TILE_TOKENS:
        raise ValueError(f"tile_tokens must be between 1 and {MAX_TILE_TOKENS}, got {tile_tokens}")


def word_dtype(tile_tokens: int) -> torch.dtype:
    """Return the integer type of the words of tiles of ``tile_tokens`` tokens.

    Raises:
        ValueError: No integer has so many bits.
    """
    check_tile_tokens(tile_tokens)
    return torch.int32 if tile_tokens <= 32 else torch.int64
