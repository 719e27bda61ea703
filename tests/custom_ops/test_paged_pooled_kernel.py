"""The kernels of pooled queries over pages select what those over one piece select."""

from typing import Any

import pytest
import torch
from torch import Tensor

from infllm_flex.selection import compress_for_pooled
from infllm_flex.selection import pool_queries as pool_for
from infllm_flex_ops import (
    append_paged_windows,
    pool_queries,
    select_cached_blocks_pooled,
    select_paged_blocks_pooled,
    select_paged_chunk_pooled,
)
from tests.custom_ops.harness import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    fenced_allocations,
    require_kernels,
    run_on_device,
)
from tests.custom_ops.test_paged_pooled import (
    COUNTS,
    EVERY_KEY,
    LENGTHS,
    PAIRS,
    config_rule,
    filled_rows,
    flat,
)
from tests.inputs import make_qkv, small_config
from tests.paged import Rows, draw_rows, query_start

require_kernels()
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")  # by numpy

from infllm_flex_ops.selection.kernels.prefill import launch_pooled  # noqa: E402
from tests.custom_ops.selection_launches import (  # noqa: E402
    launch_select_cached_pooled,
    launch_select_pooled,
)

FLOAT8 = {**EVERY_KEY, "score_dtype": "float8"}
SLOWEST = {**EVERY_KEY, "score_dims": 32}
WIDE = {**EVERY_KEY, "block_size": 64, "window_size": 64, "topk": 2}
N = 3


def launch(op: Any, *args: Any) -> Any:
    """Run the kernels of an operator from the arguments that it takes."""
    return op.launcher()(*op.pack(*args))


class Case:
    """Rows over pages and over one piece, and few queries of them."""

    def __init__(self, settings: dict[str, Any], page_size: int, lengths: list[int], **shape: Any):
        G, D = shape.pop("G", 2), shape.get("D", 16)
        self.rows: Rows = filled_rows(settings, lengths, page_size, shared=1, **shape)
        dtype = shape.get("dtype", torch.float32)
        self.q = make_qkv(N, B=len(lengths), Hq=2 * G, D=D, dtype=dtype)[0]
        if shape.get("whole_numbers"):  # means that both sides round in the same way
            self.q = (3 * self.q).round().mul(G)
        config = self.config = self.rows.cache.config
        capacity = self.rows.k.shape[2]
        width = max(config.num_selected, -(-min(config.dense_len - 1, capacity) // 16))
        self.float8 = config.score_dtype == "float8"
        self.limits = config.dense_len, width

    def unpaged(self) -> tuple[Any, ...]:
        """The arguments of `select_cached_blocks_pooled`."""
        state = self.rows.unpaged(self.config)
        keys = self.rows.k if self.config.scores_keys else state.compressed
        return (
            self.q, keys, state.start, state.end, *config_rule(self.config), *self.limits,
            self.float8,
        )  # fmt: skip

    def paged(self, counts: list[int]) -> tuple[Any, ...]:
        """The arguments of `select_paged_blocks_pooled`, with two queries of no row at the end."""
        where = self.rows.block_table, self.rows.seq_lens, query_start(counts)
        rule = config_rule(self.config)
        keys = self.rows.cache.scored
        return (flat(self.q, counts), keys, *where, *rule, *self.limits, N, self.float8)


def split(lists: Tensor, counts: list[int]) -> list[Tensor]:
    """Split lists into those of the rows' queries."""
    return list(lists.split([*counts, 2], 1)[:-1])


@pytest.mark.parametrize(
    ("settings", "page_size", "G", "D", "dtype"),
    [
        (WIDE, 16, 4, 128, DTYPES[0]),  # a block of four pages
        (WIDE, 64, 3, 40, DTYPES[-1]),
        ({**EVERY_KEY, "dense_len": 100}, 128, 1, 64, DTYPES[0]),
        (FLOAT8, 8, 2, 24, DTYPES[-1]),
        (FLOAT8, 64, 1, 16, DTYPES[0]),
        (PAIRS, 32, 2, 16, DTYPES[1]),
        (SLOWEST, 64, 3, 128, DTYPES[0]),
        ({**SLOWEST, "score_dtype": "float8"}, 16, 2, 80, DTYPES[-1]),
        ({**PAIRS, "score_dims": 4}, 32, 2, 24, DTYPES[1]),
    ],
    ids=str,
)
def test_few_queries_get_the_bits_of_one_piece(
    settings: dict[str, Any], page_size: int, G: int, D: int, dtype: torch.dtype
) -> None:
    case = Case(settings, page_size, [230, 17, 3, 128], G=G, D=D, dtype=dtype)
    counts = [N] * 4
    expected = run_on_device(launch_select_cached_pooled, *case.unpaged())
    lists = run_on_device(lambda *x: launch(select_paged_blocks_pooled, *x), *case.paged(counts))
    for row, own in enumerate(split(lists, counts)):
        assert torch.equal(own, expected[row])


@pytest.mark.parametrize("score_dtype", ["same", "float8"])
@pytest.mark.parametrize(("page_size", "D"), [(16, 24), (64, 80)])
def test_append_copies_the_slowest_dims_as_the_definition_does(
    page_size: int, D: int, score_dtype: str
) -> None:
    settings = {**EVERY_KEY, "score_dims": 8, "score_dtype": score_dtype}
    rows = draw_rows(small_config(**settings), LENGTHS, page_size, D=D)
    cache, batch = rows.cache, rows.batch([9, 17, 0, 4, 1, 30, 1])
    sizes = (*cache.rule.windows, *cache.rule.coarse_windows)
    args = (cache.key, cache.compressed, None, *batch[:3], batch.max_new, *sizes)
    ours = [x.to(DEVICE, copy=True) if isinstance(x, Tensor) else x for x in args]
    append_paged_windows(*args)
    append_paged_windows.launcher()(*ours)
    assert torch.equal(ours[1].cpu().float().nan_to_num(), args[1].float().nan_to_num())


@pytest.mark.parametrize(
    ("settings", "page_size"), [(EVERY_KEY, 16), (FLOAT8, 128), (PAIRS, 64)], ids=str
)
def test_rows_with_different_numbers_of_queries_are_served(
    settings: dict[str, Any], page_size: int
) -> None:
    case = Case(settings, page_size, LENGTHS, whole_numbers=True)
    if case.rows.cache.compressed is not None:  # means are not whole
        case.rows.cache.compressed.copy_(case.rows.cache.compressed.round())
    counts = [min(count, N) for count in COUNTS]
    args = case.paged(counts)
    lists = run_on_device(lambda *x: launch(select_paged_blocks_pooled, *x), *args)
    expected = select_paged_blocks_pooled(*args)
    for own, definition in zip(split(lists, counts), split(expected, counts), strict=True):
        assert torch.equal(own, definition)


def test_rows_with_more_queries_are_left_out() -> None:
    case = Case(EVERY_KEY, 16, LENGTHS, whole_numbers=True)
    counts = [min(count, N) for count in COUNTS]
    args = list(case.paged(counts))
    everything = select_paged_blocks_pooled(*args)
    args[-2] = N - 1
    some = run_on_device(lambda *x: launch(select_paged_blocks_pooled, *x), *args)
    for count, few, own in zip(counts, split(some, counts), split(everything, counts), strict=True):
        assert count == N or torch.equal(few, own)


@pytest.mark.parametrize(
    ("settings", "page_size", "Sq", "D", "dtype"),
    [
        (WIDE, 16, 20, 128, DTYPES[1]),
        (WIDE, 64, 9, 40, DTYPES[0]),
        (EVERY_KEY, 128, 5, 64, DTYPES[-1]),
        (EVERY_KEY, 8, 40, 16, DTYPES[0]),
        ({**EVERY_KEY, "block_size": 12, "window_size": 12}, 12, 6, 16, DTYPES[1]),
        (FLOAT8, 64, 9, 24, DTYPES[-1]),
        (FLOAT8, 16, 5, 256, DTYPES[0]),
        (PAIRS, 32, 5, 16, DTYPES[1]),
        (SLOWEST, 64, 9, 80, DTYPES[0]),
        ({**SLOWEST, "score_dtype": "float8"}, 16, 5, 128, DTYPES[-1]),
        ({**PAIRS, "score_dims": 4}, 32, 5, 24, DTYPES[1]),
    ],
    ids=str,
)
def test_a_chunk_gets_the_bits_of_one_piece(
    settings: dict[str, Any], page_size: int, Sq: int, D: int, dtype: torch.dtype
) -> None:
    rows = filled_rows(settings, [40, 230], page_size, D=D, dtype=dtype)
    config = rows.cache.config
    q = make_qkv(Sq, Hq=6, D=D, dtype=dtype)[0]
    pooled, rule = pool_for(q, 2, config), config_rule(config)
    keys = compress_for_pooled(rows.k[1:, :, :230], config)
    expected = run_on_device(launch_select_pooled, pooled, keys, 230, *rule)
    args = pooled[0], rows.cache.scored, rows.block_table[1], 230, *rule
    lists = run_on_device(lambda *x: launch(select_paged_chunk_pooled, *x), *args)
    assert torch.equal(lists, expected[0])


@pytest.mark.parametrize("page_size", [16, 64])
def test_many_queries_over_a_rounded_copy_get_the_bits_of_few(
    page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = filled_rows(FLOAT8, [40, 230], page_size, D=24, dtype=DTYPES[-1])
    pooled = pool_queries(make_qkv(9, Hq=6, D=24, dtype=DTYPES[-1])[0], 2, True, 24)[0]
    args = pooled, rows.cache.scored, rows.block_table[1], 230, *config_rule(rows.cache.config)
    lists = []
    for copy_from in (10, 9):
        monkeypatch.setattr(launch_pooled, "_COPY_FROM", copy_from)
        lists.append(run_on_device(lambda *x: launch(select_paged_chunk_pooled, *x), *args))
    assert torch.equal(*lists)


@pytest.mark.parametrize("settings", [EVERY_KEY, FLOAT8], ids=str)
def test_a_chunk_of_whole_numbers_gets_what_the_definition_gives(settings: dict[str, Any]) -> None:
    rows = filled_rows(settings, [40, 500], 64, whole_numbers=True, dtype=torch.float16)
    q = (make_qkv(9, Hq=4, dtype=torch.float16)[0] * 3).round().mul(2)
    pooled = pool_queries(q, 2, settings is FLOAT8, 16)[0]
    args = pooled, rows.cache.key, rows.block_table[1], 500, *config_rule(rows.cache.config)
    lists = run_on_device(lambda *x: launch(select_paged_chunk_pooled, *x), *args)
    assert torch.equal(lists, select_paged_chunk_pooled(*args))


@pytest.mark.skipif(not INTERPRETED, reason="guard pages surround CPU memory only")
@pytest.mark.parametrize("settings", [EVERY_KEY, FLOAT8, {**FLOAT8, "score_dims": 8}], ids=str)
def test_touches_nothing_outside(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(settings, 16, [230, 0, 64, 17], D=24, whole_numbers=True)
    counts = [2, 0, 1, 2]
    few = case.paged(counts)
    pooled = pool_for(case.q[:1], 2, case.config)[0]
    rows, rule = case.rows, config_rule(case.config)
    chunk = pooled, rows.cache.scored, rows.block_table[0], 230, *rule
    expected = select_paged_blocks_pooled(*few), select_paged_chunk_pooled(*chunk)
    with fenced_allocations(monkeypatch):
        lists = launch(select_paged_blocks_pooled, *few)
        of_chunk = launch(select_paged_chunk_pooled, *chunk)
    assert torch.equal(lists[:, :5], expected[0][:, :5])
    assert torch.equal(of_chunk, expected[1])


def test_the_definition_over_one_piece_agrees_with_the_kernel_over_pages() -> None:
    case = Case(EVERY_KEY, 16, LENGTHS, whole_numbers=True)
    counts = [min(length, N) for length in LENGTHS]
    args = case.paged(counts)
    lists = run_on_device(lambda *x: launch(select_paged_blocks_pooled, *x), *args)
    expected = select_cached_blocks_pooled(*case.unpaged())
    for row, (count, own) in enumerate(zip(counts, split(lists, counts), strict=True)):
        assert torch.equal(own, expected[row, :, N - count :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 4}, "at most 16384 blocks"),
        ({"block_size": 512}, "at most 256 windows to a block"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_registers_is_refused(changes: dict[str, int], message: str) -> None:
    length = 16385 * 4
    q, keys = torch.zeros(2, 1, 16), torch.zeros(1, 2, length, 16)
    table = torch.zeros(1, dtype=torch.int32)
    rule = 1, changes["block_size"], 1, 0, 5
    with pytest.raises(NotImplementedError, match=f"select_paged_chunk_pooled .*{message}"):
        launch(select_paged_chunk_pooled, q, keys, table, length, *rule)
