"""Registered ``infllm_flex::*`` operators. Importing this package registers them all."""

from infllm_flex_ops.assert_async import assert_async
from infllm_flex_ops.block_attention.attend_blocks import attend_blocks
from infllm_flex_ops.block_attention.attend_cached_blocks import attend_cached_blocks
from infllm_flex_ops.block_attention.attend_paged_blocks import attend_paged_blocks
from infllm_flex_ops.block_attention.attend_paged_chunk import attend_paged_chunk
from infllm_flex_ops.block_attention.attend_paged_rows import attend_paged_rows
from infllm_flex_ops.block_attention.repair_nonfinite_heads import repair_nonfinite_heads
from infllm_flex_ops.block_lists.split_shared_blocks import split_shared_blocks
from infllm_flex_ops.block_lists.tile_blocks import tile_blocks
from infllm_flex_ops.block_lists.transpose_blocks import transpose_blocks
from infllm_flex_ops.selection.append_paged_windows import append_paged_windows
from infllm_flex_ops.selection.append_windows import append_windows
from infllm_flex_ops.selection.compress_keys import compress_keys
from infllm_flex_ops.selection.pool_queries import pool_queries
from infllm_flex_ops.selection.select_blocks import select_blocks
from infllm_flex_ops.selection.select_blocks_pooled import select_blocks_pooled
from infllm_flex_ops.selection.select_cached_blocks import select_cached_blocks
from infllm_flex_ops.selection.select_cached_blocks_pooled import select_cached_blocks_pooled
from infllm_flex_ops.selection.select_paged_blocks import select_paged_blocks
from infllm_flex_ops.selection.select_paged_blocks_pooled import select_paged_blocks_pooled
from infllm_flex_ops.selection.select_paged_chunk_pooled import select_paged_chunk_pooled

__all__ = [
    "append_paged_windows",
    "append_windows",
    "assert_async",
    "attend_blocks",
    "attend_cached_blocks",
    "attend_paged_blocks",
    "attend_paged_chunk",
    "attend_paged_rows",
    "compress_keys",
    "pool_queries",
    "repair_nonfinite_heads",
    "select_blocks",
    "select_blocks_pooled",
    "select_cached_blocks",
    "select_cached_blocks_pooled",
    "select_paged_blocks",
    "select_paged_blocks_pooled",
    "select_paged_chunk_pooled",
    "split_shared_blocks",
    "tile_blocks",
    "transpose_blocks",
]
