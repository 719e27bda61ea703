"""Arguments of the selection kernels, grouped by what they belong to."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from infllm_flex_ops.selection.rule import SelectionRule
from infllm_flex_ops.triton_common.tensor_args import View


class Tile(NamedTuple):
    """Compile-time sizes of a program.

    Attributes:
        G: Query heads per KV head.
        HEADS: The group, padded to a power of two.
        TOKENS: Tokens of a tile, a power of two. Its rows are HEADS * TOKENS, head after head, so
            that the sum over heads stays in a thread.
        D: Head dim.
        BLOCK_D: The head dim, padded to a power of two.
        BLOCK_N: Windows per step, a power of two.
        FP32: Multiply float32 exactly, without tensor cores.
    """

    G: int
    HEADS: int
    TOKENS: int
    D: int
    BLOCK_D: int
    BLOCK_N: int
    FP32: bool


class WindowSlots(NamedTuple):
    """The windows that a step scores for each block, at compile time.

    Attributes:
        PER_BLOCK: Windows that begin in a block.
        BEFORE: Windows that begin further back and are scored again for the block.
        TAIL: Last windows of a block that count for the next block as well, without being scored
            again.
        SLOTS: PER_BLOCK + BEFORE, padded to a power of two.
    """

    PER_BLOCK: int
    BEFORE: int
    TAIL: int
    SLOTS: int


class Part(NamedTuple):
    """The equal parts that a table of documents cuts the positions into; zeros without a table.

    Attributes:
        SIZE: Positions of a part.
        ROWS: Rows of a part: SIZE, padded to whole tiles, so that no tile holds two documents.
    """

    SIZE: int
    ROWS: int


class KernelSizes(NamedTuple):
    """All that a prefill kernel knows at compile time.

    Attributes:
        RULE: Settings of the selection.
        PART: Size of the documents' parts.
        WINDOWS: Windows that a step scores for each block.
        TILE: Sizes of a program.
        SEGMENT: Blocks of a segment, whose best score is stored as well; 0 stores none.
    """

    RULE: SelectionRule
    PART: Part
    WINDOWS: WindowSlots
    TILE: Tile
    SEGMENT: int


class Scores(NamedTuple):
    """Where scores go.

    Attributes:
        ptr: Scores of blocks, float32 ``[num_heads, rows, columns]``.
        segment_ptr: The best score of each segment, float32 ``[num_heads, rows, columns //
            SEGMENT]``.
        columns: Blocks that have room, a multiple of 64.
    """

    ptr: Any
    segment_ptr: Any
    columns: int


class Run(NamedTuple):
    """The blocks that a program scores, in a kernel.

    Attributes:
        first_block: First block.
        end_block: One past the last block.
        num_scored: One past the last block that is scored for the tile; later ones are forced.
    """

    first_block: Any
    end_block: Any
    num_scored: Any


class HeadKeys(NamedTuple):
    """Keys of one KV head and one sequence, in a kernel, by pointer or by tensor descriptor.

    Attributes:
        view: View of the keys; its pointer is that of the sequence's first key.
        desc: Tensor descriptor of all keys, or None.
        b: Batch row, a coordinate of the descriptor.
        h: KV head, a coordinate of the descriptor.
        start: First key, a coordinate of the descriptor.
        table: Pointer to the pages of a row, or None.
    """

    view: Any
    desc: Any
    b: Any
    h: Any
    start: Any
    table: Any = None


@triton.jit
def view_head(keys, b, h, start, PART: tl.constexpr):
    """View of one KV head's keys, ``b`` and ``h`` int64, from the key ``start`` on.

    ``start`` is 0 without documents. Triton 3.6 returns no None from a function, so that callers
    add the tensor descriptor.
    """
    ptr = keys.ptr
    if PART.SIZE > 0:
        ptr += start.to(tl.int64) * keys.s
    ptr += b * keys.b + h * keys.h
    return View(ptr, keys.b, keys.h, keys.s, keys.d)
