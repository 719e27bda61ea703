"""Arguments and helpers of kernels that walk the lists of tiles.

A row is one query head of one token, ``token * G + head``. The rows of a tile share its keys.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Shape(NamedTuple):
    """Compile-time sizes of the problem.

    Attributes:
        G: Query heads per KV head.
        D: Head dim.
        BLOCK_SIZE: Keys per block.
        TILE_TOKENS: Tokens per tile.
        PAGE: Keys of a page; 0 for keys in one piece.
    """

    G: int
    D: int
    BLOCK_SIZE: int
    TILE_TOKENS: int
    PAGE: int = 0


class Tile(NamedTuple):
    """Compile-time sizes of a program.

    Attributes:
        PARTS: Programs, or steps of one, that divide the rows of a tile.
        ROWS: Rows of a part, a power of two.
        BLOCK_N: Keys per step, a power of two.
        BLOCK_D: The head dim, padded to a power of two.
        FP32: Multiply float32 exactly, without tensor cores.
        USE_TMA: Load keys and values by TMA.
    """

    PARTS: int
    ROWS: int
    BLOCK_N: int
    BLOCK_D: int
    FP32: bool
    USE_TMA: bool


class Rows(NamedTuple):
    """Rows of a tile, in a kernel.

    Attributes:
        row: Row within the tile.
        token: Token within the tile.
        s: Token within the queries.
        position: Position of the token among the keys.
        q_head: Query head.
        exists: Whether the row is one of the tile's and of the sequence's.
    """

    row: Any
    token: Any
    s: Any
    position: Any
    q_head: Any
    exists: Any


class KeyValues(NamedTuple):
    """The keys and values of one KV head, by pointer or by tensor descriptor.

    Attributes:
        k: View of the head's keys.
        v: View of the head's values.
        k_desc: Tensor descriptor of all keys, or None.
        v_desc: Tensor descriptor of all values, or None.
        b: Batch row, a coordinate of the descriptors.
        h: KV head, a coordinate of the descriptors.
        table: Pointer to the pages of the row; None for keys in one piece.
    """

    k: Any
    v: Any
    k_desc: Any
    v_desc: Any
    b: Any
    h: Any
    table: Any


class TileList(NamedTuple):
    """One tile's list, in a kernel.

    Attributes:
        idx: Pointer to its blocks; None for blocks 0, 1, 2 and so on, of which each token selected
            all.
        membership: Pointer to their membership bits, or None.
        num: Blocks in the list.
        num_past: The first of them, all of whose keys lie before the tile's first token.
        width: Slots of the list. Words of tokens beyond the 64th are as many words further on.
    """

    idx: Any
    membership: Any
    num: Any
    num_past: Any
    width: Any


class Keys(NamedTuple):
    """The keys of one step over a list, in a kernel.

    Attributes:
        first: The first key.
        index: All keys ``[BLOCK_N]``.
        valid: Whether each key is one of the block's and of the sequence's ``[BLOCK_N]``.
        member: Whether each row selected the block ``[ROWS]``.
    """

    first: Any
    index: Any
    valid: Any
    member: Any


@triton.jit
def locate_rows(part, tile, h, Sq, Skv, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """Locate the rows of one part of a tile."""
    row = part * TILE.ROWS + tl.arange(0, TILE.ROWS)
    token = row // SHAPE.G
    s = tile * SHAPE.TILE_TOKENS + token
    position = Skv - Sq + s
    q_head = h * SHAPE.G + row % SHAPE.G
    exists = (token < SHAPE.TILE_TOKENS) & (s < Sq)
    return Rows(row, token, s, position, q_head, exists)


@triton.jit
def open_list(lists, tile_in_all, Skv, SHAPE: tl.constexpr):
    """Point at one tile's list, and count its blocks."""
    num = tl.minimum(tl.load(lists.num + tile_in_all), lists.width)
    # The tile's own tokens span at most EDGES blocks. Lists are ascending, so every earlier entry
    # lies entirely in the past and needs no causal test.
    EDGES: tl.constexpr = (SHAPE.TILE_TOKENS + SHAPE.BLOCK_SIZE - 2) // SHAPE.BLOCK_SIZE + 1
    num_past = tl.maximum(num - EDGES, 0)
    if Skv < SHAPE.BLOCK_SIZE:
        num_past = 0
    start = tile_in_all * lists.width
    WORDS: tl.constexpr = (SHAPE.TILE_TOKENS + 63) // 64
    return TileList(lists.idx + start, lists.membership + start * WORDS, num, num_past, lists.width)


@triton.jit
def read_step(
    tile_list, i, token, Skv, SHAPE: tl.constexpr, TILE: tl.constexpr, EDGE: tl.constexpr
):
    """Read which keys step ``i`` of a list holds. A block takes ``BLOCK_SIZE / BLOCK_N`` steps."""
    CHUNKS: tl.constexpr = (SHAPE.BLOCK_SIZE + TILE.BLOCK_N - 1) // TILE.BLOCK_N
    last = (Skv - 1) // SHAPE.BLOCK_SIZE if EDGE else Skv // SHAPE.BLOCK_SIZE - 1
    if tile_list.idx is None:
        block = i // CHUNKS
        member = token >= 0
    else:
        # Clamp, so that a corrupt list cannot read out of bounds.
        block = tl.minimum(tl.maximum(tl.load(tile_list.idx + i // CHUNKS), 0), last)
        word = tl.load(tile_list.membership + i // CHUNKS)
        if SHAPE.TILE_TOKENS > 64:
            second = tl.load(tile_list.membership + tile_list.width + i // CHUNKS)
            word = tl.where(token < 64, word, second)
            token = token % 64
        member = ((word >> token) & 1) != 0
    inner = i % CHUNKS * TILE.BLOCK_N + tl.arange(0, TILE.BLOCK_N)
    first = block * SHAPE.BLOCK_SIZE + i % CHUNKS * TILE.BLOCK_N
    index = first + tl.arange(0, TILE.BLOCK_N)
    valid = inner < SHAPE.BLOCK_SIZE
    if EDGE:
        valid = valid & (index < Skv)
    return Keys(first, index, valid, member)
