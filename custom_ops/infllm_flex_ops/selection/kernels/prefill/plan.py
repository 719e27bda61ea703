"""Plan a selection before its first launch, from sizes and settings alone.

Rows are divided into chunks whose scores fit a fixed workspace. Rows that take every block need no
scores. The plan touches no tensor and asks no device.
"""

from __future__ import annotations

from typing import NamedTuple

import triton

from infllm_flex_ops.selection.kernels.kernel_args import Part
from infllm_flex_ops.selection.rule import SelectionRule

SEGMENT_BLOCKS = 16  # blocks of a long row whose best score is stored as well
SCORE_BYTES = 176 << 20
LSE_BYTES = 64 << 20
MAX_BLOCKS = 1 << 14  # a row's scores live in the registers of at most 32 warps
_MIN_PROGRAMS = 1024  # several per multiprocessor: below that, columns are split among programs


class Sizes(NamedTuple):
    """Sizes of a selection's inputs; ``num_parts`` is 0 without documents."""

    batch: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    num_parts: int

    @property
    def num_heads(self) -> int:
        """KV heads of all batch rows."""
        return self.batch * self.num_kv_heads

    @property
    def q_offset(self) -> int:
        """Position of the first query."""
        return self.kv_len - self.q_len


class Chunk(NamedTuple):
    """Rows of some heads whose scores fit the workspace together.

    Attributes:
        heads: KV heads, counted over all batch rows.
        rows: Rows to score.
        lse_rows: Rows whose log-sum-exp is computed together: those of several chunks, since the
            rows of one chunk would not fill the device.
    """

    heads: range
    rows: range
    lse_rows: range

    @property
    def starts_lse(self) -> bool:
        """Whether this is the first chunk of its ``lse_rows``."""
        return self.rows.start == self.lse_rows.start


class Topk(NamedTuple):
    """How the blocks of some rows are selected.

    Attributes:
        listed: Blocks that a program holds at most, a power of two.
        segments: Segments from which the blocks are taken, a power of two; 0: from all blocks.
        num_warps: Warps of a program.
        maxnreg: Registers per thread: fewer let more rows run side by side, if nothing spills.
    """

    listed: int
    segments: int
    num_warps: int
    maxnreg: int


class Plan(NamedTuple):
    """The launches of a selection.

    Attributes:
        sizes: Sizes of the inputs.
        rule: Settings.
        tokens: Tokens of a tile.
        part: Size of the documents' parts.
        part_start: Part of the first query.
        full_rows: Rows that take every block. With documents only the device knows these rows.
        columns: Blocks that the scores have room for. Rows start aligned, for wide loads.
        num_scores: Scores in the workspace.
        num_lse: Log-sum-exps in the workspace.
        chunks: Chunks of the other rows, in order.
        stores_segments: Whether the best score of each segment is stored.
    """

    sizes: Sizes
    rule: SelectionRule
    tokens: int
    part: Part
    part_start: int
    full_rows: range
    columns: int
    num_scores: int
    num_lse: int
    chunks: tuple[Chunk, ...]
    stores_segments: bool

    def count_listed(self, rows: range) -> int:
        """Count the blocks that some of the rows see, up to a power of two."""
        last = self.sizes.q_offset + rows.stop - 1
        if self.sizes.num_parts:  # the device knows which rows these are
            last = self.sizes.kv_len - 1
        return max(128, triton.next_power_of_2(last // self.rule.block_size + 1))

    def count_segments(self, rows: range) -> int:
        """Count the segments from which the rows' blocks are taken; 0: from all blocks."""
        if not self.stores_segments:
            return 0
        budget = self.rule.num_selected - self.rule.local_blocks - 1
        segments = count_segments(budget, self.rule.init_blocks)
        return segments if 2 * segments * SEGMENT_BLOCKS <= self.count_listed(rows) else 0

    def plan_topk(self, rows: range, has_scores: bool) -> Topk:
        """Choose how the blocks of some rows are selected."""
        if not has_scores:  # every block is taken
            return Topk(16, 0, 1, 72)
        listed, segments = self.count_listed(rows), self.count_segments(rows)
        width = listed
        if segments:
            width = max(listed // SEGMENT_BLOCKS, segments * SEGMENT_BLOCKS)
        maxnreg = 128
        if width <= 1024:
            maxnreg = 88 if segments else 72
        return Topk(listed, segments, max(1, width // 1024), maxnreg)


def make_plan(
    sizes: Sizes,
    rule: SelectionRule,
    tokens: int,
    lse_per_tile: int,
    stores_segments: bool,
) -> Plan:
    """Plan a selection.

    Args:
        sizes: Sizes of the inputs.
        rule: Settings.
        tokens: Tokens of a tile.
        lse_per_tile: Log-sum-exps of a tile; 0 if scores are not normalised.
        stores_segments: Whether the scoring kernel stores the best score of each segment.
    """
    part, part_start = Part(0, 0), 0
    num_rows = sizes.q_len
    full_rows = range(min(max(rule.budget_tokens - sizes.q_offset, 0), sizes.q_len))
    if sizes.num_parts:
        size = sizes.kv_len // sizes.num_parts
        part = Part(size, _round_up(size, tokens))
        part_start = sizes.q_offset // size
        num_rows = (sizes.num_parts - part_start) * part.ROWS
        full_rows = range(0)
    columns = (sizes.kv_len - 1) // rule.block_size - rule.local_blocks
    columns = max(64, _round_up(columns, 64))
    rows = range(full_rows.stop, num_rows)
    num_tiles = triton.cdiv(len(rows), tokens)
    num_scores = num_lse = 0
    chunks: tuple[Chunk, ...] = ()
    if num_tiles:
        score_bytes = 4 * (columns + columns // SEGMENT_BLOCKS) * tokens
        heads, tiles = _fit(SCORE_BYTES, score_bytes, sizes.num_heads, num_tiles)
        num_chunks = max(1, LSE_BYTES // max(1, 4 * lse_per_tile * heads * tiles))
        lse_tiles = min(tiles * num_chunks, num_tiles)
        num_scores, num_lse = heads * tiles * tokens * columns, heads * lse_tiles * lse_per_tile
        chunks = tuple(_cut(sizes.num_heads, heads, rows, tiles * tokens, lse_tiles * tokens))
    return Plan(
        sizes,
        rule,
        tokens,
        part,
        part_start,
        full_rows,
        columns,
        num_scores,
        num_lse,
        chunks,
        stores_segments,
    )


def count_segments(budget: int, init_blocks: int) -> int:
    """Count the segments that hold the ``budget`` best blocks of a row, up to a power of two."""
    forced = triton.cdiv(init_blocks, SEGMENT_BLOCKS)
    return triton.next_power_of_2(max(budget - init_blocks, 0) + forced + 1)


def split_columns(columns: int, programs: int) -> tuple[int, int]:
    """Cut the blocks of a chunk among programs.

    There are enough programs at any length, and they take long runs of blocks where tiles abound.

    Returns:
        Programs per tile, and the blocks of each, a multiple of 64.
    """
    splits = max(
        triton.cdiv(columns, 512), min(triton.cdiv(columns, 64), _MIN_PROGRAMS // programs)
    )
    split_blocks = _round_up(triton.cdiv(columns, splits), 64)
    return triton.cdiv(columns, split_blocks), split_blocks


def check_num_blocks(name: str, num_blocks: int, blocks: str = "blocks") -> None:
    """Check that the blocks that an operator scores fit the registers.

    Raises:
        NotImplementedError: There are too many blocks.
    """
    if num_blocks > MAX_BLOCKS:
        raise NotImplementedError(
            f"{name} handles at most {MAX_BLOCKS} {blocks} on CUDA, got {num_blocks}: "
            f"use a larger block_size"
        )


def _fit(limit: int, tile_bytes: int, num_heads: int, num_tiles: int) -> tuple[int, int]:
    """Choose how many heads, and how many tiles of each, fit ``limit`` bytes: at least one."""
    budget = max(1, limit // tile_bytes)
    heads = min(num_heads, budget)
    return heads, min(num_tiles, budget // heads)


def _cut(num_heads: int, step_heads: int, rows: range, step: int, lse_step: int) -> list[Chunk]:
    """Cut rows into chunks; ``lse_step`` is a multiple of ``step`` or covers all rows."""
    chunks = []
    for head in range(0, num_heads, step_heads):
        heads = range(num_heads)[head : head + step_heads]
        for i in range(0, len(rows), step):
            lse_start = i // lse_step * lse_step
            lse_rows = rows[lse_start : lse_start + lse_step]
            chunks.append(Chunk(heads, rows[i : i + step], lse_rows))
    return chunks


def _round_up(x: int, multiple: int) -> int:
    return triton.cdiv(x, multiple) * multiple
