"""How the backward is divided into programs: from shapes, strides and the device alone."""

from typing import NamedTuple

import triton
from torch import Tensor

from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.dkv_args import KeyTile
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.dq import RowLayout
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.ranges import Ranges
from infllm_flex_ops.block_attention.kernels.attend_blocks_backward.splits import (
    bound_splits,
    choose_split_size,
)
from infllm_flex_ops.block_attention.kernels.tile_args import Shape, Tile
from infllm_flex_ops.block_lists import union_lists
from infllm_flex_ops.device import compute_capability, has_little_shared_memory
from infllm_flex_ops.triton_common.descriptors import can_use_tma

_TMA_ROWS = 64  # rows of a step for dk and dv that loads them by TMA
REDUCED_KEYS = 16  # keys that a program adds up over the splits of their block
RANGE_BYTES = 16 << 20  # of queries and gradients, which stay in L2 while all blocks walk them
_FIRST_BLOCKS = 256  # that walk the first range side by side, to occupy the device
_SUM_PROGRAMS = 1024  # after which the slots of a head's sums are free: several times those at once
# Heads per group whose tokens dk and dv gather. Tiles of more heads hold few tokens, most of which
# selected the block. One head has a token per row, each to be looked up.
_GATHERED_HEADS = range(2, 9)
_GATHERED_BYTES = 1 << 30  # at most, of a table with a bit for each token and block, and its counts


class KernelPlan(NamedTuple):
    """One launch: programs, compile-time sizes, and compile options such as ``num_warps``."""

    programs: int
    tile: Tile
    options: dict[str, int]


class KeyPlan(NamedTuple):
    """The launch for dk and dv.

    Attributes:
        programs: Programs.
        shape: Compile-time sizes of the problem; tiles of one token if tokens are gathered.
        tile: Compile-time sizes.
        options: Compile options.
        registers: Registers per thread; None: as many as ptxas chooses.
        num_tiles: Tiles of a head.
        split_size: Tiles per split.
        ranges: Ranges of tiles.
    """

    programs: int
    shape: Shape
    tile: KeyTile
    options: dict[str, int]
    registers: int | None
    num_tiles: int
    split_size: int
    ranges: Ranges


class BackwardPlan(NamedTuple):
    """All launches of one backward.

    Attributes:
        shape: Compile-time sizes of the problem.
        dq: Launch over the lists of the tiles.
        dkv: Launch over the blocks.
        reduce_programs: Programs that add up the splits of blocks.
        row_layout: Where the dq kernel keeps what the dkv kernel reads of each row.
        keys_by_tma: Whether the dq kernel loads keys and values by TMA.
        rows_by_tma: Whether the dkv kernel loads queries and gradients by TMA.
        num_blocks: Blocks of keys.
        max_splits: Most splits of a head's blocks.
        fits_32_bits: Whether offsets within a tile do.
    """

    shape: Shape
    dq: KernelPlan
    dkv: KeyPlan
    reduce_programs: int
    row_layout: RowLayout
    keys_by_tma: bool
    rows_by_tma: bool
    num_blocks: int
    max_splits: int
    fits_32_bits: bool


def plan_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    block_size: int,
    tokens: int,
    slots: int | None = None,
) -> BackwardPlan:
    """Plan the launches.

    Args:
        grad_out: Gradient of the output.
        q: Queries ``[B, Hq, Sq, D]``.
        k: Keys.
        v: Values.
        idx: Lists ``[B, Hkv, num_tiles, width]`` of the tiles.
        block_size: Keys per block.
        tokens: Tokens per tile.
        slots: Slots of a token's own list; None if it is not known.
    """
    B, Hkv, num_tiles, width = idx.shape
    D, G = q.shape[3], q.shape[1] // Hkv
    heads, num_blocks = B * Hkv, triton.cdiv(k.shape[2], block_size)
    keys_by_tma = can_use_tma(k, v)
    rows_by_tma = _fill_boxes(tokens, G, D, block_size) and can_use_tma(q, grad_out)
    (dq_tile, dq_options), (dkv_tile, dkv_options) = _choose_tiles(
        q, G, tokens, block_size, keys_by_tma, rows_by_tma
    )
    box_tokens = dkv_tile.ROWS // triton.next_power_of_2(G)
    max_splits = bound_splits(num_blocks)
    chunks = triton.cdiv(block_size, dkv_tile.BLOCK_N)
    shape, offset = Shape(G, D, block_size, tokens), k.shape[2] - q.shape[2]
    # Masks of sums would spill, and so would parts of a block.
    in_ranges = rows_by_tma and D == dkv_tile.BLOCK_D and chunks == 1
    ranges = _choose_ranges(q, shape, heads, num_tiles, offset, in_ranges)
    per_head = (max_splits + ranges.first_blocks + ranges.others * num_blocks) * chunks
    plan = BackwardPlan(
        shape=shape,
        dq=KernelPlan(heads * num_tiles * dq_tile.PARTS, dq_tile, dq_options),
        dkv=KeyPlan(
            programs=heads * per_head,
            shape=shape,
            tile=KeyTile(*dkv_tile, IN_RANGES=in_ranges),
            options=dkv_options,
            registers=None if rows_by_tma else 255,  # or ptxas may spill to fit more programs
            num_tiles=num_tiles,
            split_size=choose_split_size(num_tiles * min(width, num_blocks), num_blocks),
            ranges=ranges,
        ),
        reduce_programs=heads * max_splits * triton.cdiv(block_size, REDUCED_KEYS),
        row_layout=RowLayout(
            TILE_ROWS=dkv_tile.PARTS * dkv_tile.ROWS,
            BOX_TOKENS=box_tokens if rows_by_tma else 0,
            BOX_ROWS=dkv_tile.ROWS,
        ),
        keys_by_tma=keys_by_tma,
        rows_by_tma=rows_by_tma,
        num_blocks=num_blocks,
        max_splits=max_splits,
        fits_32_bits=_fit_32_bits(q, grad_out, G, tokens),
    )
    if slots is None or not _can_gather(q, shape, heads * num_blocks):
        return plan
    return _gather(plan, q, heads, offset, slots)


def _can_gather(q: Tensor, shape: Shape, blocks: int) -> bool:
    """Whether dk and dv gather the tokens that selected a block, on Hopper, where measured.

    A tile of many tokens holds some that did not select a block, whose rows would be masked.
    """
    fits = q.element_size() == 2 and shape.D in (16, 32, 64, 128) and shape.BLOCK_SIZE == 64
    fits = fits and shape.G in _GATHERED_HEADS and compute_capability(q) == 90
    return fits and 2 * blocks * triton.cdiv(q.shape[2], 32) * 4 <= _GATHERED_BYTES


def _gather(plan: BackwardPlan, q: Tensor, heads: int, offset: int, slots: int) -> BackwardPlan:
    """Let dk and dv take single tokens, each with a list of ``slots``, instead of tiles."""
    shape, Sq = plan.shape._replace(TILE_TOKENS=1), q.shape[2]
    tile = KeyTile(
        PARTS=1,
        ROWS=64,
        BLOCK_N=64,
        BLOCK_D=shape.D,
        FP32=False,
        USE_TMA=False,
        IN_RANGES=True,
        GATHERED=plan.shape.TILE_TOKENS,
    )
    ranges = _choose_ranges(q, shape, heads, Sq, offset, in_ranges=True)
    per_head = plan.max_splits + ranges.first_blocks + ranges.others * plan.num_blocks
    tile_rows = shape.G * plan.shape.TILE_TOKENS
    return plan._replace(
        dkv=KeyPlan(
            programs=heads * per_head,
            shape=shape,
            tile=tile,
            options={"num_warps": 4, "num_stages": 2},
            registers=255,
            num_tiles=Sq,
            split_size=choose_split_size(Sq * min(slots, plan.num_blocks), plan.num_blocks),
            ranges=ranges,
        ),
        row_layout=RowLayout(TILE_ROWS=tile_rows, BOX_TOKENS=0, BOX_ROWS=tile_rows),
        rows_by_tma=False,
    )


def _choose_ranges(
    q: Tensor, shape: Shape, heads: int, num_tiles: int, offset: int, in_ranges: bool
) -> Ranges:
    """Divide the tiles of a head into ranges for dk and dv, on Hopper, where it was measured.

    Early tokens selected nearly all blocks that they see: few blocks, of long lists. All heads walk
    them first, side by side, unless those of one head occupy the device.
    """
    G, D, block_size, tokens, _ = shape
    tile_bytes = 2 * tokens * G * D * q.element_size()
    range_tiles = max(1, RANGE_BYTES // (32 * tile_bytes)) * 32
    range_tokens = range_tiles * tokens
    first_tiles = max(1, _FIRST_BLOCKS * block_size // (heads * range_tokens)) * range_tiles
    if triton.cdiv(offset + range_tokens, block_size) >= _FIRST_BLOCKS:
        first_tiles = 0
    if not in_ranges or num_tiles <= first_tiles + range_tiles:
        first_tiles = num_tiles
    num_blocks = triton.cdiv(offset + q.shape[2], block_size)
    first_blocks = min(num_blocks, triton.cdiv(offset + first_tiles * tokens, block_size))
    if first_tiles == 0:
        first_blocks = 0
    others = triton.cdiv(num_tiles - first_tiles, range_tiles)
    sum_heads = 1 + triton.cdiv(_SUM_PROGRAMS, max(1, others * num_blocks))
    return Ranges(
        first_tiles=first_tiles,
        tiles=range_tiles,
        others=others,
        first_blocks=first_blocks,
        heads_at_once=triton.cdiv(_FIRST_BLOCKS, max(1, first_blocks)),
        sum_heads=min(heads, sum_heads),
    )


def choose_tile_tokens(q: Tensor, k: Tensor) -> int:
    """Choose how many tokens share a tile: as many as the rows of one step hold."""
    G = q.shape[1] // k.shape[1]
    if q.element_size() > 2:
        return union_lists.choose_tile_tokens(G, 16)
    if _group_fills_boxes(G, q.shape[3]) and can_use_tma(q):
        return union_lists.choose_tile_tokens(triton.next_power_of_2(G), 64)
    return union_lists.choose_tile_tokens(G, 64, 32)


def _fill_boxes(tile_tokens: int, G: int, D: int, block_size: int) -> bool:
    """Whether boxes of ``_TMA_ROWS`` cut a tile into whole tokens, and keys fill a step too."""
    rows = tile_tokens * triton.next_power_of_2(G)
    is_power = rows & (rows - 1) == 0
    return _group_fills_boxes(G, D) and is_power and rows >= 16 and block_size % 64 == 0


def _group_fills_boxes(G: int, D: int) -> bool:
    """Whether few enough of a box's rows are padding, and registers are left for its rows."""
    padded = triton.next_power_of_2(G)
    return padded <= _TMA_ROWS and 5 * padded <= 8 * G and D <= 128


def _fit_32_bits(q: Tensor, grad_out: Tensor, G: int, tile_tokens: int) -> bool:
    """Whether offsets between the rows of a tile fit into 32 bits, in both tensors."""
    return all(
        abs(x.stride(1)) * G + abs(x.stride(2)) * tile_tokens + abs(x.stride(3)) * x.shape[3]
        < 1 << 31
        for x in (q, grad_out)
    )


_TileOptions = tuple[Tile, dict[str, int]]


def _choose_tiles(
    q: Tensor, G: int, tile_tokens: int, block_size: int, keys_by_tma: bool, rows_by_tma: bool
) -> tuple[_TileOptions, _TileOptions]:
    """Choose rows and keys per step, for dq and for dk and dv, that the registers hold."""
    block_d = max(16, triton.next_power_of_2(q.shape[3]))
    block_n = triton.next_power_of_2(block_size)
    fp32 = q.element_size() > 2  # without tensor cores: operands in registers
    masked = q.shape[3] < block_d or block_size % 64 != 0  # masks take registers

    def tile(
        use_tma: bool, most_rows: int, most_keys: int, warps: int, tile_rows: int = G * tile_tokens
    ) -> _TileOptions:
        rows = max(16, min(most_rows, triton.next_power_of_2(tile_rows)))
        sizes = Tile(
            PARTS=triton.cdiv(tile_rows, rows),
            ROWS=rows,
            BLOCK_N=max(16, min(most_keys, block_n)),
            BLOCK_D=block_d,
            FP32=fp32,
            USE_TMA=use_tma,
        )
        return sizes, {"num_warps": warps, "num_stages": 1 if fp32 else 2}

    if fp32:
        return tile(False, 16, 16, 4), tile(False, 16, 16, 8 if block_d > 128 else 4)
    if block_d > 128:
        keys = 32 if has_little_shared_memory(q) else 64
        return tile(keys_by_tma, 32, keys, 8), tile(False, 32, 32, 8)
    # Without TMA, masks and 64 membership bits take registers.
    roomy = keys_by_tma or not (masked or tile_tokens > 32)
    by_tile = tile(keys_by_tma, 64, 64 if block_d == 128 and roomy else 32, 4)
    if rows_by_tma:
        return by_tile, tile(True, _TMA_ROWS, 64, 4, triton.next_power_of_2(G) * tile_tokens)
    if block_d == 128:
        return by_tile, tile(False, 32, 64, 8 if masked else 4)
    return by_tile, (tile(False, 32, 32, 8) if masked else tile(False, 32, 64, 4))
