"""Arguments that the pieces of the dkv kernel pass to each other."""

from typing import Any, NamedTuple


class KeyTile(NamedTuple):
    """Compile-time sizes of a program that sums the gradients of keys and values.

    Attributes:
        PARTS: Steps that divide the rows of a tile.
        ROWS: Rows of a step, a power of two.
        BLOCK_N: Keys of a program, a power of two.
        BLOCK_D: The head dim, padded to a power of two.
        FP32: Multiply float32 exactly, without tensor cores.
        USE_TMA: Load queries and gradients by TMA.
        IN_RANGES: Blocks may walk the sequence range by range; then a program takes a whole block.
        GATHERED: Tokens of a tile of the dq kernel, if a step here takes the rows of single tokens
            that selected the block; else 0.
    """

    PARTS: int
    ROWS: int
    BLOCK_N: int
    BLOCK_D: int
    FP32: bool
    USE_TMA: bool
    IN_RANGES: bool
    GATHERED: int = 0


class KeyGradients(NamedTuple):
    """The gradients of keys and values, and sums on the way to them.

    A slot holds the float32 sums of one block, ``[2, block_size, D]``: 64 KiB for 64 keys of 128.

    Attributes:
        dk: ``[B, Hkv, Skv, D]``, contiguous.
        dv: ``[B, Hkv, Skv, D]``, contiguous.
        partial: Slots of the splits ``[B * Hkv * max_splits]``.
        first: Slots of the first range ``[B * Hkv * first_blocks]``.
        sums: Slots of the other ranges so far ``[sum_heads * blocks]``, which heads use in turn.
        flags: Zeroed int32: the programs that have begun; how many slots in ``sums`` each head
            needs no more, ``[B * Hkv]``; and the ranges in ``first`` and in ``sums``,
            ``[2, B * Hkv * blocks]``.
    """

    dk: Any
    dv: Any
    partial: Any
    first: Any
    sums: Any
    flags: Any


class Queries(NamedTuple):
    """The queries of one KV head's group and what the backward knows of them, in a kernel.

    Attributes:
        q: View of the group's queries.
        do: View of the gradient of their output.
        q_desc: Tensor descriptor of all queries, or None.
        do_desc: Tensor descriptor of the whole gradient, or None.
        row_lse: Log-sum-exp of the head's rows in base 2: pointer, or descriptor of all rows.
        row_delta: Dot products of output and gradient, likewise.
        first_tile: First tile of the head among those of all heads.
        num_tiles: Tiles of the head.
        b: Batch row.
        h: KV head.
        Sq: Queries of the sequence.
        offset: Position of the first query.
        qk_scale_log2: Factor on the dot products, times log2 e.
    """

    q: Any
    do: Any
    q_desc: Any
    do_desc: Any
    row_lse: Any
    row_delta: Any
    first_tile: Any
    num_tiles: Any
    b: Any
    h: Any
    Sq: Any
    offset: Any
    qk_scale_log2: Any


class BlockKeys(NamedTuple):
    """Keys of one block, in a kernel.

    Attributes:
        k: The keys.
        v: Their values.
        position: Their positions.
    """

    k: Any
    v: Any
    position: Any


class BlockTiles(NamedTuple):
    """Tiles that listed one block, in a kernel. A tile may be one token.

    Attributes:
        tile: Pointer to the first of them.
        membership: Pointer to its membership bits; None for tokens.
        begin: First tile to take.
        end: One past the last tile to take.
    """

    tile: Any
    membership: Any
    begin: Any
    end: Any
