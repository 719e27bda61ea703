"""Load windows and queries of a tile on Hopper, some steps before they are multiplied.

A step takes one window of each of ``STEP`` blocks. Its windows wait in a stage of shared memory.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from infllm_flex_ops.selection.kernels import online_softmax
from infllm_flex_ops.selection.kernels.prefill.tiles import HOPPER_STEP

_count_windows = gluon.jit(online_softmax.count_windows.fn)

STEP = gl.constexpr(HOPPER_STEP)  # blocks, a row each of a matrix instruction


class Steps(NamedTuple):
    """The steps that score a run of blocks.

    Attributes:
        begin: First step.
        edge: First step that tests whether windows are visible.
        end: One past the last step.
        run: First step of the run's own blocks; the steps before belong to the block before.
    """

    begin: Any
    edge: Any
    end: Any
    run: Any


class Pipeline(NamedTuple):
    """Steps of a program, and the stages of shared memory that their windows are loaded into.

    Attributes:
        steps: The steps.
        desc: Tensor descriptor of the keys.
        b: Batch row.
        h: KV head.
        part_block: Block that the sequence starts with.
        smem: Windows of each stage.
        full: Barrier of each stage.
    """

    steps: Any
    desc: Any
    b: Any
    h: Any
    part_block: Any
    smem: Any
    full: Any


@gluon.jit
def locate_steps(run, rows, C, SIZES: gl.constexpr):
    """Find the steps that score a run of blocks of a sequence of ``C`` windows."""
    RULE: gl.constexpr = SIZES.RULE
    WINDOWS: gl.constexpr = SIZES.WINDOWS
    own = run.first_block // STEP * WINDOWS.PER_BLOCK  # runs start at multiples of STEP
    begin = gl.maximum(own - WINDOWS.TAIL, 0)  # the first block needs the tail of the one before
    end = gl.cdiv(run.end_block, STEP) * WINDOWS.PER_BLOCK
    # Every row sees all windows of the blocks up to here: of all listed blocks, or of whole steps.
    whole = _count_windows(rows.q_offset + rows.start, RULE.kernel_size, RULE.kernel_stride, C)
    whole = whole // WINDOWS.PER_BLOCK
    edge = gl.maximum(begin, whole // STEP * WINDOWS.PER_BLOCK)
    return Steps(begin, gl.where(whole >= run.end_block, end, edge), end, own)


@gluon.jit
def find_step(i, run, WINDOWS: gl.constexpr):
    """Find the first block of step ``i`` and the window that it takes of each block.

    Windows that reach into the next block come first. They do so for the blocks before the run,
    too.

    Returns:
        The first block, the window slot within a block, its place in the order of a block's
        windows, and whether the step belongs to the blocks before the run.
    """
    early = i < run
    place = gl.where(early, i - run + WINDOWS.TAIL, i % WINDOWS.PER_BLOCK)
    block = gl.where(early, run // WINDOWS.PER_BLOCK * STEP - STEP, i // WINDOWS.PER_BLOCK * STEP)
    return block, (place + WINDOWS.PER_BLOCK - WINDOWS.TAIL) % WINDOWS.PER_BLOCK, place, early


@gluon.jit
def load_step(i, pipeline, WINDOWS: gl.constexpr):
    """Start to load the windows of step ``i``."""
    smem = pipeline.smem
    block, slot, _, _ = find_step(i, pipeline.steps.run, WINDOWS)
    stage = (i - pipeline.steps.begin) % smem.shape[0]
    BYTES: gl.constexpr = smem.shape[3] * smem.shape[5] * smem.dtype.primitive_bitwidth // 8
    at = [pipeline.b, pipeline.h, pipeline.part_block + block, slot, 0]
    full = pipeline.full.index(stage)
    exists = i < pipeline.steps.end
    mbarrier.expect(full, BYTES, pred=exists)
    tma.async_copy_global_to_shared(pipeline.desc, at, full, smem.index(stage), pred=exists)


@gluon.jit
def start_pipeline(steps, desc, place, part_block, SIZES: gl.constexpr, STAGES: gl.constexpr):
    """Allocate the stages and start to load the first steps of a tile at ``place``."""
    TILE: gl.constexpr = SIZES.TILE
    WINDOWS: gl.constexpr = SIZES.WINDOWS
    smem = gl.allocate_shared_memory(desc.dtype, [STAGES, 1, 1, STEP, 1, TILE.BLOCK_D], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    pipeline = Pipeline(steps, desc, place.b, place.h, part_block, smem, full)
    for step in gl.static_range(STAGES):
        mbarrier.init(full.index(step), count=1)
    fence_async_shared()
    for step in gl.static_range(STAGES):
        load_step(steps.begin + step, pipeline, WINDOWS)
    return pipeline


@gluon.jit
def load_queries(q, b, h, first, row_end, DTYPE: gl.constexpr, TILE: gl.constexpr):
    """Load the query rows of a tile as columns ``[D, HEADS * TOKENS]`` of shared memory."""
    COLUMNS: gl.constexpr = TILE.HEADS * TILE.TOKENS
    BLOCK_D: gl.constexpr = TILE.BLOCK_D
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, BLOCK_D], DTYPE)
    column = gl.arange(0, COLUMNS, gl.SliceLayout(1, LOADED))
    row = first + column % TILE.TOKENS
    group = column // TILE.TOKENS
    d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LOADED))
    q_row = b.to(gl.int64) * q.b + (h * TILE.G + group).to(gl.int64) * q.h
    q_row += row.to(gl.int64) * q.s
    mask = ((group < TILE.G) & (row < row_end))[:, None] & (d < TILE.D)[None, :]
    x = gl.load(q.ptr + q_row[:, None] + d[None, :] * q.d, mask=mask, other=0.0)
    return gl.allocate_shared_memory(DTYPE, [COLUMNS, BLOCK_D], SHARED, x).permute((1, 0))
