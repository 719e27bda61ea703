"""The plan of a selection covers every row once, within its workspace; no GPU is needed."""

import itertools

import pytest

pytest.importorskip("triton")

from infllm_flex_ops.selection.kernels.kernel_args import WindowSlots
from infllm_flex_ops.selection.kernels.prefill import plan as plans
from infllm_flex_ops.selection.kernels.prefill.plan import (
    SEGMENT_BLOCKS,
    Plan,
    Sizes,
    check_num_blocks,
    make_plan,
    split_columns,
)
from infllm_flex_ops.selection.kernels.prefill.tiles import (
    Inputs,
    choose_pooled_tile,
    choose_scoring,
    choose_windows,
    fits_hopper,
)
from infllm_flex_ops.selection.rule import SelectionRule

RULE = SelectionRule(32, 16, 128, 64, 64, 1, 32, 96)
SMALL = SelectionRule(8, 4, 32, 16, 16, 1, 2, 5)
TOKENS, HEADS = 8, 16
MAX_GRID = 2**31 - 1


def _plan(sizes: Sizes, rule: SelectionRule = RULE, *, normalised: bool = True) -> Plan:
    return make_plan(sizes, rule, TOKENS, HEADS * TOKENS if normalised else 0, True)


def _cells(plan: Plan) -> list[tuple[int, int]]:
    """All heads and rows that are listed or scored, in order."""
    cells = list(itertools.product(range(plan.sizes.num_heads), plan.full_rows))
    for chunk in plan.chunks:
        cells += itertools.product(chunk.heads, chunk.rows)
    return cells


@pytest.mark.parametrize("limits", [(176 << 20, 64 << 20), (40_000, 20_000), (1, 1), (1 << 16, 1)])
@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        (Sizes(1, 2, 205, 205, 0), SMALL),
        (Sizes(2, 3, 70, 205, 0), SMALL),  # the last queries
        (Sizes(1, 1, 1, 205, 0), SMALL),
        (Sizes(3, 1, 9, 9, 0), SMALL),  # every block fits
        (Sizes(5, 1, 90, 90, 0), SMALL),
        (Sizes(1, 2, 80, 80, 1), SMALL),
        (Sizes(2, 1, 1, 1, 0), SMALL),
        (Sizes(1, 2, 6145, 6145, 0), RULE),  # one row more than what fits
    ],
)
def test_every_row_of_every_head_is_selected_once(sizes, rule, limits, monkeypatch):
    monkeypatch.setattr(plans, "SCORE_BYTES", limits[0])
    monkeypatch.setattr(plans, "LSE_BYTES", limits[1])
    plan = _plan(sizes, rule)
    rows = plan.full_rows.stop
    if plan.chunks:
        rows = max(chunk.rows.stop for chunk in plan.chunks)
    assert sorted(_cells(plan)) == list(itertools.product(range(sizes.num_heads), range(rows)))
    if not sizes.num_parts:
        assert rows == sizes.q_len


@pytest.mark.parametrize("q_len", [1, 79, 80, 81, 500])
@pytest.mark.parametrize("kv_len", [80, 81, 500, 505])
def test_rows_take_every_block_while_all_fit_the_budget(q_len, kv_len):
    q_len = min(q_len, kv_len)
    plan = _plan(Sizes(1, 1, q_len, kv_len, 0), SMALL)
    full = [row for row in range(q_len) if (kv_len - q_len + row) // 16 < 5]
    assert list(plan.full_rows) == full


def test_rows_of_documents_are_padded_to_whole_tiles_and_none_is_known_to_be_full():
    plan = _plan(Sizes(1, 1, 60, 100, 5), SMALL)  # parts of 20 positions, the queries in the third
    assert plan.part == (20, 24)
    assert plan.part_start == 2
    assert plan.full_rows == range(0)
    assert _cells(plan) == [(0, row) for row in range(3 * 24)]


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("score_bytes", "lse_bytes"), [(40_000, 20_000), (176 << 20, 64 << 20)])
@pytest.mark.parametrize("sizes", [Sizes(2, 2, 900, 5000, 0), Sizes(1, 8, 20_000, 1 << 17, 0)])
def test_a_workspace_stays_within_its_bound(sizes, score_bytes, lse_bytes, normalised, monkeypatch):
    monkeypatch.setattr(plans, "SCORE_BYTES", score_bytes)
    monkeypatch.setattr(plans, "LSE_BYTES", lse_bytes)
    plan = _plan(sizes, SMALL if sizes.kv_len < 6000 else RULE, normalised=normalised)
    tile = TOKENS * plan.columns
    num_scores = plan.num_scores + plan.num_scores // SEGMENT_BLOCKS
    assert 4 * num_scores <= max(score_bytes, 4 * (tile + tile // SEGMENT_BLOCKS))
    assert (plan.num_lse > 0) == normalised
    for chunk in plan.chunks:
        rows = -(-len(chunk.rows) // TOKENS) * TOKENS
        assert len(chunk.heads) * rows * plan.columns <= plan.num_scores
        lse_tiles = -(-len(chunk.lse_rows) // TOKENS)
        assert len(chunk.heads) * lse_tiles * HEADS * TOKENS * normalised <= plan.num_lse
    if normalised:
        one_chunk = len(plan.chunks[0].heads) * len(plan.chunks[0].rows) * HEADS
        assert 4 * plan.num_lse <= max(lse_bytes, 4 * one_chunk + 4 * HEADS * TOKENS)


@pytest.mark.parametrize("lse_bytes", [1, 100_000, 1 << 30])
def test_every_chunk_is_normalised_before_it_is_scored(lse_bytes, monkeypatch):
    monkeypatch.setattr(plans, "SCORE_BYTES", 60_000)
    monkeypatch.setattr(plans, "LSE_BYTES", lse_bytes)
    ready = None
    chunks = _plan(Sizes(2, 2, 900, 1300, 0), SMALL).chunks
    assert len(chunks) > 8
    for chunk in chunks:
        if chunk.starts_lse:
            ready = chunk.heads, chunk.lse_rows
        assert ready == (chunk.heads, chunk.lse_rows)
        assert set(chunk.rows) <= set(chunk.lse_rows)
        assert (chunk.rows.start - chunk.lse_rows.start) % TOKENS == 0
    assert sum(chunk.starts_lse for chunk in chunks) == {
        1: len(chunks),
        1 << 30: len({chunk.heads for chunk in chunks}),
    }.get(lse_bytes, sum(chunk.starts_lse for chunk in chunks))


@pytest.mark.parametrize(
    "sizes", [Sizes(70_000, 1, 6200, 6200, 0), Sizes(1, 1, 1 << 20, 1 << 20, 0)]
)
def test_programs_fit_a_grid_whatever_the_number_of_heads(sizes):
    plan = _plan(sizes)
    assert sizes.num_heads * len(plan.full_rows) <= MAX_GRID
    for chunk in plan.chunks:
        tiles = -(-len(chunk.rows) // TOKENS) * len(chunk.heads)
        splits, split_blocks = split_columns(plan.columns, tiles)
        assert splits * split_blocks >= plan.columns
        assert splits * tiles <= MAX_GRID
        assert len(chunk.heads) * len(chunk.rows) <= MAX_GRID


@pytest.mark.parametrize("columns", [64, 128, 4032, 16384])
@pytest.mark.parametrize("programs", [1, 7, 1024, 100_000])
def test_runs_of_blocks_cover_the_columns(columns, programs):
    splits, split_blocks = split_columns(columns, programs)
    assert split_blocks % 64 == 0
    assert split_blocks <= 512
    assert (splits - 1) * split_blocks < columns <= splits * split_blocks


def test_long_rows_are_selected_from_segments_and_short_ones_are_not():
    plan = _plan(Sizes(1, 1, 1 << 18, 1 << 18, 0))
    short, long = plan.chunks[0].rows, plan.chunks[-1].rows
    assert plan.plan_topk(short, has_scores=True).segments == 0
    assert plan.plan_topk(long, has_scores=True) == (4096, 64, 1, 88)
    assert plan.plan_topk(long, has_scores=False) == (16, 0, 1, 72)
    without = plan._replace(stores_segments=False)
    assert without.plan_topk(long, has_scores=True) == (4096, 0, 4, 128)


def test_rows_of_documents_may_see_every_block():
    plan = _plan(Sizes(1, 1, 8192, 1 << 17, 128))
    assert plan.count_listed(range(1)) == 2048


def test_refuses_rows_beyond_the_registers():
    check_num_blocks("select_blocks", 16384)
    with pytest.raises(NotImplementedError, match="at most 16384 blocks on CUDA, got 16385"):
        check_num_blocks("select_blocks", 16385)


@pytest.mark.parametrize(
    ("rule", "windows"),
    [
        (RULE, (4, 0, 1, 4)),
        (RULE._replace(kernel_size=96, block_size=32), (2, 5, 0, 8)),  # further than one block back
        (RULE._replace(kernel_size=16), (4, 0, 0, 4)),
        (RULE._replace(kernel_size=24, kernel_stride=12, block_size=36), (3, 0, 1, 4)),
        (SelectionRule.from_pooled(1, 64, 1, 4, 96), (64, 0, 0, 64)),
    ],
)
def test_windows_that_overlap_a_block_are_scored_for_it(rule, windows):
    assert choose_windows(rule) == WindowSlots(*windows)


def _inputs(**changes: int) -> Inputs:
    return Inputs(16, 128, 2, 5000, has_tma=True)._replace(**changes)


def test_a_method_is_chosen_by_what_fits():
    assert fits_hopper(_inputs(), RULE)
    assert choose_scoring(_inputs(), RULE, True).method == "hopper"
    assert choose_scoring(_inputs(), RULE, False).method == "tma"
    assert choose_scoring(_inputs(has_tma=False), RULE, False).method == "pointers"
    gaps = RULE._replace(kernel_size=24, kernel_stride=12, block_size=36)
    assert choose_scoring(_inputs(), gaps, False).method == "pointers"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"has_tma": False}, RULE),
        ({"group": 17}, RULE),
        ({"head_dim": 256}, RULE),
        ({"head_dim": 32}, RULE),
        ({"element_size": 4}, RULE),
        ({"num_windows": 3}, RULE),
        ({}, RULE._replace(local_blocks=0)),
        ({}, RULE._replace(kernel_size=96, block_size=32)),
    ],
)
def test_the_kernel_for_hopper_does_not_fit(changes, rule):
    assert not fits_hopper(_inputs(**changes), rule)


@pytest.mark.parametrize("group", [1, 2, 3, 16, 64, 200])
@pytest.mark.parametrize("head_dim", [16, 80, 128, 256])
@pytest.mark.parametrize("element_size", [2, 4])
def test_a_tile_holds_a_group_and_whole_blocks(group, head_dim, element_size):
    inputs = _inputs(group=group, head_dim=head_dim, element_size=element_size, has_tma=False)
    scoring = choose_scoring(inputs, RULE, False)
    tile = scoring.tile
    assert tile.HEADS >= group > tile.HEADS // 2
    assert tile.BLOCK_D >= head_dim > tile.BLOCK_D // 2
    assert tile.BLOCK_N % scoring.windows.SLOTS == 0
    assert scoring.step_blocks * scoring.windows.SLOTS == tile.BLOCK_N
    assert scoring.stores_segments == (scoring.step_blocks % 16 == 0)


@pytest.mark.parametrize("slots", [1, 4, 64, 256])
@pytest.mark.parametrize("element_size", [1, 2, 4])
def test_a_step_of_pooled_queries_takes_whole_blocks_of_one_segment(slots, element_size):
    tile, _ = choose_pooled_tile(_inputs(element_size=element_size), slots, False)
    blocks = tile.BLOCK_N // slots
    assert blocks * slots == tile.BLOCK_N
    assert SEGMENT_BLOCKS % blocks == 0
