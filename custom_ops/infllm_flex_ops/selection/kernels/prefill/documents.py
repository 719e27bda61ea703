"""Find the place of a tile's rows among the sequences of a padded or packed batch."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from infllm_flex_ops.selection.kernels.kernel_args import Run


class Documents(NamedTuple):
    """The table of documents, in a kernel.

    Attributes:
        ptr: Int32 ``[B, num_parts, 3]``; not read without documents.
        num_parts: Parts of a batch row.
        part_start: Part of the first query.
    """

    ptr: Any
    num_parts: Any
    part_start: Any


class ChunkRows(NamedTuple):
    """The rows of a chunk, in a kernel; heads are counted over all batch rows.

    Attributes:
        head_start: First KV head.
        num_heads: Number of KV heads.
        row_start: First row.
        row_end: One past the last row.
        q_offset: Position of the first query.
    """

    head_start: Any
    num_heads: Any
    row_start: Any
    row_end: Any
    q_offset: Any


class TileRows(NamedTuple):
    """The rows of a tile, in a kernel.

    Attributes:
        start: Query that the first row is.
        end: Query after the last one of the sequence, the part or the chunk.
        q_offset: Position of the first query in its own sequence.
        seq_start: Position of the sequence's first token.
        budget: Budget of the sequence, in blocks.
    """

    start: Any
    end: Any
    q_offset: Any
    seq_start: Any
    budget: Any


class TilePlace(NamedTuple):
    """Where the tile of a program lies, in a kernel.

    Attributes:
        head: KV head among those of the chunk.
        tile: Tile among those of the chunk.
        out_row: Row of the scores that the first row is, int64.
        split: Program among those of the tile.
        b: Batch row.
        h: KV head of the batch row.
        rows: Rows of the tile.
        last_position: Position of the last row.
        needs_no_scores: Whether no row of the tile needs scores, as each takes every block.
    """

    head: Any
    tile: Any
    out_row: Any
    split: Any
    b: Any
    h: Any
    rows: Any
    last_position: Any
    needs_no_scores: Any


@triton.jit
def locate_rows(documents_ptr, row, row_end, q_offset, part_start, budget, PART: tl.constexpr):
    """Locate a tile whose first row is ``row``.

    With documents, rows are counted in parts of ``PART.ROWS``, from the part ``part_start`` on. A
    part of ``PART.SIZE`` positions has rows for whole tiles, so that no tile holds two documents.
    ``documents_ptr`` points at the parts of the tile's batch row.
    """
    seq_start = 0
    if PART.SIZE > 0:
        part = part_start + row // PART.ROWS
        row = part * PART.SIZE + row % PART.ROWS - q_offset
        # Clamp, so that a corrupt table cannot lead out of the positions up to here.
        seq_start = tl.minimum(tl.maximum(tl.load(documents_ptr + part * 3), 0), part * PART.SIZE)
        seq_end = tl.load(documents_ptr + part * 3 + 1)
        budget = tl.load(documents_ptr + part * 3 + 2)
        row_end = tl.minimum(seq_end, part * PART.SIZE + PART.SIZE) - q_offset
        q_offset -= seq_start
    return TileRows(row, row_end, q_offset, seq_start, budget)


@triton.jit
def locate_tile(chunk, documents, Hkv, splits, SIZES: tl.constexpr):
    """Locate the tile of a program, one of ``splits`` that share it. The longest tiles come first.

    Programs beside each other take the same tile of all heads.
    """
    RULE: tl.constexpr = SIZES.RULE
    PART: tl.constexpr = SIZES.PART
    TILE: tl.constexpr = SIZES.TILE
    TOKENS: tl.constexpr = TILE.TOKENS
    num_rows = chunk.row_end - chunk.row_start
    head = tl.program_id(0) % chunk.num_heads
    split = tl.program_id(0) // chunk.num_heads % splits
    tile = (num_rows + TOKENS - 1) // TOKENS - 1 - tl.program_id(0) // chunk.num_heads // splits
    out_row = head.to(tl.int64) * num_rows + tile * TOKENS
    b = (chunk.head_start + head) // Hkv
    h = (chunk.head_start + head) % Hkv
    rows = locate_rows(
        documents.ptr + b.to(tl.int64) * documents.num_parts * 3,
        chunk.row_start + tile * TOKENS,
        chunk.row_end,
        chunk.q_offset,
        documents.part_start,
        RULE.num_selected,
        PART,
    )
    last_position = rows.q_offset + tl.minimum(rows.start + TOKENS, rows.end) - 1
    is_full = last_position < rows.budget * RULE.block_size
    needs_no_scores = is_full | (rows.start >= rows.end)
    return TilePlace(head, tile, out_row, split, b, h, rows, last_position, needs_no_scores)


@triton.jit
def cut_run(place, split_blocks, RULE: tl.constexpr):
    """Cut the blocks that a program scores from those of its tile: ``split_blocks`` at most."""
    num_scored = place.last_position // RULE.block_size - RULE.local_blocks  # later ones are forced
    first_block = place.split * split_blocks
    return Run(first_block, tl.minimum(first_block + split_blocks, num_scored), num_scored)
