"""Choose the tiles of a selection by dtype, head dim, group and settings.

Neither the length nor the batch plays a part, so that a row's bits never depend on them.
"""

from typing import NamedTuple

import triton

from infllm_flex_ops.selection.kernels.kernel_args import Tile, WindowSlots
from infllm_flex_ops.selection.kernels.prefill.plan import SEGMENT_BLOCKS
from infllm_flex_ops.selection.rule import SelectionRule

HOPPER_STEP = 64  # blocks that the kernel for Hopper scores at once, one window of each
MAX_WINDOWS = 256  # windows of a block, which one step of the pooled kernel scores together


class Inputs(NamedTuple):
    """The sizes that tiles depend on.

    Attributes:
        group: Query heads per KV head.
        head_dim: Head dim.
        element_size: Bytes of a number.
        num_windows: Compressed keys of the sequence.
        has_tma: Whether the compressed keys are loaded by TMA.
    """

    group: int
    head_dim: int
    element_size: int
    num_windows: int
    has_tma: bool


class Scoring(NamedTuple):
    """How windows are scored.

    Attributes:
        tile: Sizes of a program.
        windows: Windows that are scored for a block.
        method: ``"pointers"``, ``"tma"``, or ``"hopper"``, which scores one window of every block
            at a time.
        options: Warps and stages of the log-sum-exp kernel, and of the scoring kernel but for
            ``"hopper"``.
    """

    tile: Tile
    windows: WindowSlots
    method: str
    options: dict[str, int]

    @property
    def step_blocks(self) -> int:
        """Blocks that are scored at once."""
        if self.method == "hopper":
            return HOPPER_STEP
        return self.tile.BLOCK_N // self.windows.SLOTS

    @property
    def stores_segments(self) -> bool:
        """Whether the best score of each segment is stored: if a step has whole segments."""
        return self.step_blocks % SEGMENT_BLOCKS == 0


def choose_windows(rule: SelectionRule) -> WindowSlots:
    """Choose which windows a step scores for a block.

    Windows that begin before a block and reach into it are scored with the block they begin in. If
    they begin further back than in the block before, they are scored again.
    """
    per_block = rule.block_size // rule.kernel_stride
    overlap = rule.kernel_size // rule.kernel_stride - 1
    tail, before = (overlap, 0) if overlap <= per_block else (0, overlap)
    return WindowSlots(per_block, before, tail, triton.next_power_of_2(per_block + before))


def choose_scoring(inputs: Inputs, rule: SelectionRule, hopper: bool) -> Scoring:
    """Choose how windows are scored.

    Args:
        inputs: The sizes that tiles depend on.
        rule: Settings.
        hopper: Use the kernel for Hopper, which ``fits_hopper`` allows.
    """
    windows = choose_windows(rule)
    tile, options = choose_tile(inputs, windows.SLOTS)
    method = "pointers"
    if hopper:
        method = "hopper"
    elif inputs.has_tma and windows.SLOTS == windows.PER_BLOCK:
        method = "tma"  # boxes have no gap between the windows of one block and the next
    if method != "pointers" and tile.HEADS > 2:
        # One more program side by side is worth more than one more stage.
        options = options | {"num_stages": 1 if tile.HEADS >= 16 else 2}
    return Scoring(tile, windows, method, options)


def choose_tile(inputs: Inputs, slots: int) -> tuple[Tile, dict[str, int]]:
    """Choose the sizes of a program, and its warps and stages."""
    heads = triton.next_power_of_2(inputs.group)
    block_d = max(16, triton.next_power_of_2(inputs.head_dim))
    fp32 = inputs.element_size > 2
    if fp32:  # without tensor cores the tile must fit in registers
        rows, block_n, warps, stages = 32, 32, 8, 1
    elif block_d <= 128 and heads > 2:
        # Rows of many heads give few scores: a third program is worth more than a third stage.
        rows, block_n, warps, stages = 128, 64, 4, 2 if heads >= 16 else 3
    else:  # wide heads take registers, and so do the scores of many tokens
        rows, block_n, warps, stages = 64, 64, 4, 2 if block_d > 128 else 3
    tokens = max(rows, heads) // heads
    tile = Tile(inputs.group, heads, tokens, inputs.head_dim, block_d, max(block_n, slots), fp32)
    return tile, {"num_warps": warps, "num_stages": stages}


def fits_hopper(inputs: Inputs, rule: SelectionRule) -> bool:
    """Whether the kernel for Hopper can score these inputs by these settings."""
    tile, _ = choose_tile(inputs, 1)
    windows = choose_windows(rule)
    # Boxes may lack windows of the last block, which is never scored if it is local.
    has_boxes = rule.local_blocks > 0 and inputs.num_windows >= windows.PER_BLOCK
    fits = tile.BLOCK_D in (64, 128) and tile.HEADS <= 16 and inputs.element_size == 2
    return fits and has_boxes and inputs.has_tma and windows.BEFORE == 0


def choose_hopper_options(heads: int) -> tuple[int, dict[str, int | None]]:
    """Choose the stages of shared memory of the kernel for Hopper, and its warps and registers.

    Three programs fit side by side on a multiprocessor, or four if a tile has few tokens and few
    scores; the scores of many tokens take registers.
    """
    stages, registers = (1, 128) if heads == 16 else (2, 168)
    return stages, {"num_warps": 4, "maxnreg": registers if heads > 1 else None}


def choose_pooled_tile(
    inputs: Inputs, slots: int, has_little_shared_memory: bool
) -> tuple[Tile, dict[str, int]]:
    """Choose the sizes of a program that scores pooled queries, and its warps and stages."""
    fewest = 32 if inputs.element_size == 1 else 16  # that a matrix instruction multiplies
    block_d = max(fewest, triton.next_power_of_2(inputs.head_dim))
    fp32 = inputs.element_size > 2
    if fp32:  # without tensor cores the tile must fit in registers
        tokens, block_n, warps, stages = 32, 32, 8, 1
    elif inputs.element_size == 1 or block_d <= 64:
        tokens, block_n, warps, stages = 128, 128, 8, 3
    else:
        tokens, block_n, warps, stages = 64, 128, 4, 3
    if block_d * inputs.element_size > 256 or has_little_shared_memory:
        stages = min(stages, 2)
    # A step holds whole blocks, at most a segment of them.
    block_n = max(min(block_n, SEGMENT_BLOCKS * slots), slots)
    tile = Tile(1, 1, tokens, inputs.head_dim, block_d, block_n, fp32)
    return tile, {"num_warps": warps, "num_stages": stages}
