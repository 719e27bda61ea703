"""Registered ``infllm_flex::*`` operators. Importing this package registers them all."""

from custom_ops.append_windows import append_windows
from custom_ops.attend_blocks import attend_blocks
from custom_ops.attend_cached_blocks import attend_cached_blocks
from custom_ops.compress_keys import compress_keys
from custom_ops.pool_queries import pool_queries
from custom_ops.redo_special_heads import redo_special_heads
from custom_ops.select_blocks import select_blocks
from custom_ops.select_blocks_pooled import select_blocks_pooled
from custom_ops.select_cached_blocks import select_cached_blocks
from custom_ops.select_cached_blocks_pooled import select_cached_blocks_pooled
from custom_ops.share_blocks import share_blocks
from custom_ops.tile_blocks import tile_blocks
from custom_ops.transpose_blocks import transpose_blocks
from custom_ops.zero_if import zero_if

__all__ = [
    "append_windows",
    "attend_blocks",
    "attend_cached_blocks",
    "compress_keys",
    "pool_queries",
    "redo_special_heads",
    "select_blocks",
    "select_blocks_pooled",
    "select_cached_blocks",
    "select_cached_blocks_pooled",
    "share_blocks",
    "tile_blocks",
    "transpose_blocks",
    "zero_if",
]
