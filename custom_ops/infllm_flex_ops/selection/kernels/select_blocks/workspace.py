"""Divide a selection into chunks that fit a workspace, and chunks among programs."""

import triton

SCORE_BYTES = 176 << 20
MAX_BLOCKS = 1 << 14  # a row's scores live in the registers of at most 32 warps
_MIN_PROGRAMS = 1024  # several per multiprocessor: below that, columns are split among programs


def chunk(limit: int, tile_bytes: int, num_heads: int, num_tiles: int) -> tuple[int, int]:
    """Choose how many heads, and how many tiles of each, are scored within ``limit`` bytes."""
    budget = max(1, limit // tile_bytes)
    heads = min(num_heads, budget)
    return heads, min(num_tiles, budget // heads)


def split(columns: int, programs: int) -> tuple[int, int]:
    """Cut the blocks among programs: enough of them at any length, long runs where they abound."""
    splits = max(
        triton.cdiv(columns, 512), min(triton.cdiv(columns, 64), _MIN_PROGRAMS // programs)
    )
    split_blocks = triton.cdiv(triton.cdiv(columns, splits), 64) * 64
    return triton.cdiv(columns, split_blocks), split_blocks
