"""The Triton kernels over pages give the bits of those over one piece, in rows of any kind."""

from typing import Any

import pytest
import torch
from torch import Tensor

from infllm_flex.decoding import select_cached
from infllm_flex.decoding.paged.selection import select_chunk
from infllm_flex_ops import (
    append_paged_windows,
    attend_paged_blocks,
    attend_paged_chunk,
    attend_paged_rows,
    select_cached_blocks,
    select_paged_blocks,
)
from tests.custom_ops.harness import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    fenced_allocations,
    require_kernels,
    run_on_device,
)
from tests.inputs import make_qkv, small_config
from tests.paged import Rows, draw_rows, query_start
from tests.tolerance import assert_within_rounding

require_kernels()
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # by numpy

from infllm_flex_ops.block_attention.kernels.attend_blocks import attend as launch_chunk  # noqa: E402
from infllm_flex_ops.block_attention.kernels.attend_cached_blocks import launch as launch_attend  # noqa: E402
from tests.custom_ops.selection_launches import launch_select_cached  # noqa: E402

LENGTHS = [230, 17, 0, 64, 1, 231, 128]
COUNTS = [5, 3, 0, 1, 1, 5, 2]
FEW_LENGTHS = [230, 0, 64, 17]  # programs are interpreted one by one
FEW_COUNTS = [2, 0, 1, 2]
# The defaults, a quarter of them, and windows of other sizes.
SETTINGS: list[dict[str, Any]] = [
    {"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "window_size": 64, "topk": 2},
    {},
    {"lse": "exact", "init_blocks": 0, "dense_len": 100},
    {"kernel_size": 12, "topk": 2, "window_size": 16, "dense_len": 231},
]


def launch(op: Any, *args: Any) -> Any:
    """Run the kernels of an operator from the arguments that it takes."""
    return op.launcher()(*(args if op.pack is None else op.pack(*args)))


def append_args(rows: Rows, counts: list[int]) -> tuple[Any, ...]:
    cache, batch = rows.cache, rows.batch(counts)
    sizes = (*cache.rule.windows, *cache.rule.coarse_windows)
    return (cache.key, cache.compressed, cache.coarse, *batch[:3], batch.max_new, *sizes)


@pytest.mark.parametrize(
    ("page_size", "counts", "lse", "dtype"),
    [
        (8, LENGTHS, "coarse", DTYPES[0]),  # shorter than the step of the coarse windows
        (16, [9, 17, 0, 4, 1, 30, 1], "coarse", DTYPES[-1]),
        (64, LENGTHS, "exact", DTYPES[-1]),
        (128, [9, 17, 0, 4, 1, 30, 1], "coarse", DTYPES[0]),
    ],
    ids=str,
)
def test_append_writes_what_the_definition_writes(
    page_size: int, counts: list[int], lse: str, dtype: torch.dtype
) -> None:
    rows = draw_rows(small_config(lse=lse), LENGTHS, page_size, dtype=dtype, D=24)
    args = append_args(rows, counts)
    ours = [x.to(DEVICE, copy=True) if isinstance(x, Tensor) else x for x in args]
    append_paged_windows(*args)
    launch(append_paged_windows, *ours)
    for mine, theirs in zip(ours[1:3], args[1:3], strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


class Case:
    """Rows over pages and over one piece, and few queries of them."""

    def __init__(self, settings: dict[str, Any], page_size: int, n: int, **shape: Any) -> None:
        self.config = small_config(**settings)
        G = shape.pop("G", 2)
        lengths = shape.pop("lengths", LENGTHS)
        self.rows = draw_rows(self.config, lengths, page_size, shared=1, **shape)
        self.rows.cache.append(self.rows.batch(lengths))
        self.state = self.rows.unpaged(self.config)
        sizes = {"Hq": 2 * G, "D": shape.get("D", 16), "dtype": shape.get("dtype", torch.float32)}
        self.q = make_qkv(n, B=len(lengths), **sizes)[0]
        if shape.get("whole_numbers"):
            self.q = (3 * self.q).round()
        self.n = n

    def unpaged(self) -> tuple[Any, ...]:
        """The arguments of `select_cached_blocks`."""
        lists = select_cached(self.q, self.state, capacity=self.rows.k.shape[2])
        windows = self.state.compressed, self.state.coarse, self.state.start, self.state.end
        rule = self.rows.cache.rule
        return (self.q, *windows, *rule, self.config.dense_len, lists.shape[-1], 0.25)

    def paged(self, counts: list[int]) -> tuple[Any, ...]:
        """The arguments of `select_paged_blocks`, with two queries of no row at the end."""
        n, cache = self.n, self.rows.cache
        flat = [self.q[row, :, n - count :].transpose(0, 1) for row, count in enumerate(counts)]
        flat.append(torch.full_like(self.q[0].transpose(0, 1)[:2], torch.nan))
        windows = cache.compressed, cache.compressed if cache.coarse is None else cache.coarse
        rest = self.unpaged()[5:]
        where = self.rows.block_table, self.rows.seq_lens, query_start(counts)
        return (torch.cat(flat), *windows, *where, *rest[:-1], n, rest[-1])


def last_queries(x: Tensor, counts: list[int], tokens_dim: int) -> list[Tensor]:
    """Split a ragged result into the rows' queries."""
    return list(x[tuple([slice(None)] * tokens_dim)].split([*counts, 2], tokens_dim)[:-1])


@pytest.mark.parametrize(
    ("settings", "page_size", "G", "D"),
    [
        (SETTINGS[0], 16, 16, 128),  # a block of four pages, a coarse window every four
        (SETTINGS[0], 64, 4, 64),
        (SETTINGS[1], 128, 1, 40),
        (SETTINGS[2], 16, 4, 64),
        (SETTINGS[3], 64, 1, 128),
    ],
    ids=str,
)
def test_select_has_the_bits_of_one_piece(
    settings: dict[str, Any], page_size: int, G: int, D: int
) -> None:
    case = Case(settings, page_size, 3, G=G, D=D, lengths=[230, 17, 64, 3, 231, 128])
    counts = [3] * 6
    expected = run_on_device(launch_select_cached, *case.unpaged())
    paged = run_on_device(lambda *x: launch(select_paged_blocks, *x), *case.paged(counts))
    for row, lists in enumerate(last_queries(paged, counts, 1)):
        assert torch.equal(lists, expected[row])


@pytest.mark.parametrize(
    ("settings", "page_size"), [(SETTINGS[1], 8), (SETTINGS[2], 16), (SETTINGS[3], 64)], ids=str
)
def test_select_serves_rows_with_different_numbers_of_queries(
    settings: dict[str, Any], page_size: int
) -> None:
    case = Case(settings, page_size, 5, whole_numbers=True)
    for pages in (case.rows.cache.compressed, case.rows.cache.coarse):
        if pages is not None:  # means are not whole
            pages.copy_(pages.round())
    for windows in (case.state.compressed, case.state.coarse):
        windows.copy_(windows.round())
    args = case.paged(COUNTS)
    paged = run_on_device(lambda *x: launch(select_paged_blocks, *x), *args)
    definition = select_paged_blocks(*args)
    unpaged = select_cached_blocks(*case.unpaged())
    for row, lists in enumerate(last_queries(paged, COUNTS, 1)):
        assert torch.equal(lists, last_queries(definition, COUNTS, 1)[row])
        assert torch.equal(lists, unpaged[row, :, 5 - COUNTS[row] :])


def attend_args(case: Case, counts: list[int]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    lists = select_cached_blocks(*case.unpaged())
    rows, n = case.rows, case.n
    block_size = case.config.block_size
    ends = case.state.start, case.state.end
    unpaged = (case.q, rows.k, rows.v, lists, *ends, block_size, 0.25)
    flat, *_ = case.paged(counts)
    selected = [lists[row, :, n - count :] for row, count in enumerate(counts)]
    selected.append(torch.full_like(lists[0][:, :2], 1 << 30))
    where = rows.block_table, rows.seq_lens, query_start(counts)
    cache = rows.cache
    paged = (flat, cache.key, cache.value, torch.cat(selected, 1), *where, block_size, n, 0.25)
    return unpaged, paged


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("settings", "page_size", "G", "D"),
    [
        (SETTINGS[0], 16, 16, 64),
        (SETTINGS[0], 64, 1, 40),
        (SETTINGS[1], 128, 1, 128),
        (SETTINGS[2], 8, 4, 64),
    ],
    ids=str,
)
def test_attend_has_the_bits_of_one_piece(
    settings: dict[str, Any], page_size: int, G: int, D: int, dtype: torch.dtype
) -> None:
    case = Case(settings, page_size, 2, G=G, D=D, dtype=dtype, lengths=FEW_LENGTHS)
    unpaged, paged = attend_args(case, FEW_COUNTS)
    expected = run_on_device(launch_attend, *unpaged)
    out = run_on_device(lambda *x: launch(attend_paged_blocks, *x), *paged)
    for row, own in enumerate(last_queries(out, FEW_COUNTS, 0)):
        assert torch.equal(own, expected[row, :, 2 - FEW_COUNTS[row] :].transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("settings", "page_size", "G", "Sq", "D"),
    [
        (SETTINGS[0], 16, 4, 40, 64),
        pytest.param(
            *(SETTINGS[0], 16, 4, 40, 24),
            marks=pytest.mark.skipif(
                not INTERPRETED,
                reason="where a block has several pages and D is no power of two, Hopper takes "
                "fewer keys at a time",
            ),
        ),
        (SETTINGS[0], 64, 16, 9, 24),
        (SETTINGS[1], 8, 1, 70, 24),
    ],
    ids=str,
)
def test_attend_chunk_has_the_bits_of_one_piece(
    settings: dict[str, Any], page_size: int, G: int, Sq: int, D: int, dtype: torch.dtype
) -> None:
    config = small_config(**settings)
    rows = draw_rows(config, [40, 230], page_size, D=D, dtype=dtype)
    rows.cache.append(rows.batch([40, 230]))
    q = make_qkv(Sq, Hq=2 * G, D=D, dtype=dtype)[0]
    k, v = rows.k[1:, :, :230], rows.v[1:, :, :230]
    flat = q[0].transpose(0, 1)
    selected = select_chunk(flat, rows.cache, rows.block_table[1], 230, 0.25)
    rest = config.block_size, 0.25
    expected, _ = run_on_device(launch_chunk, q, k, v, selected[None], *rest)
    where = rows.block_table[1], 230
    args = (flat, rows.cache.key, rows.cache.value, selected, *where, *rest)
    out = run_on_device(lambda *x: launch(attend_paged_chunk, *x), *args)
    assert torch.equal(out.transpose(0, 1), expected[0])


WHOLE_LENGTHS, WHOLE_COUNTS = [60, 19, 70, 0, 64, 9], [45, 19, 30, 0, 18, 3]


def whole_rows(page_size: int, G: int, D: int, dtype: torch.dtype, block: int) -> tuple[Any, ...]:
    """The arguments of `attend_paged_rows`; the third and the last row are left out."""
    config = small_config(kernel_size=8, block_size=block, window_size=block)
    shared = int(page_size < 60)  # every row with such a page has it whole
    rows = draw_rows(config, WHOLE_LENGTHS, page_size, D=D, dtype=dtype, shared=shared)
    q = make_qkv(sum(WHOLE_COUNTS), Hq=2 * G, D=D, dtype=dtype)[0][0].transpose(0, 1)
    where = rows.block_table, rows.seq_lens, query_start(WHOLE_COUNTS)
    out = torch.full_like(q, 7.0)
    pages = rows.cache.key, rows.cache.value
    return (q, *pages, out, *where, 0, len(WHOLE_COUNTS), block, 17, 45, 64, 0.25)


def attend_rows(*args: Any) -> Tensor:
    """Run the kernels, and return what they have written to a copy of ``out``."""
    out = args[3].clone()
    launch(attend_paged_rows, *args[:3], out, *args[4:])
    return out


@pytest.mark.parametrize(
    ("page_size", "G", "D", "block", "dtype"),
    [
        (16, 16, 64, 64, DTYPES[-1]),
        (64, 1, 40, 64, DTYPES[0]),
        (128, 4, 128, 32, DTYPES[1]),
        (8, 3, 24, 16, DTYPES[0]),
    ],
    ids=str,
)
def test_attend_rows_computes_what_its_definition_computes(
    page_size: int, G: int, D: int, block: int, dtype: torch.dtype
) -> None:
    args = whole_rows(page_size, G, D, dtype, block)
    ours = run_on_device(attend_rows, *args)
    exact = [x.double() for x in args[:4]]
    attend_paged_rows(*args)
    attend_paged_rows(*exact, *args[4:])
    assert_within_rounding(ours, exact[3], args[3])
    lengths, counts = torch.tensor(WHOLE_LENGTHS), torch.tensor(WHOLE_COUNTS)
    left_out = ((lengths > 64) | (counts < 17)).repeat_interleave(counts)
    for x in (ours, args[3]):
        assert torch.equal((x == 7.0).flatten(1).all(1), left_out)


def test_attend_rows_has_the_bits_of_a_row_alone() -> None:
    args = whole_rows(16, 4, 16, torch.float16, 64)
    together = run_on_device(attend_rows, *args)
    for row in (0, 4):
        alone = run_on_device(attend_rows, *args[:7], row, 1, *args[9:])
        own = slice(args[6][row], args[6][row + 1])
        assert torch.equal(alone[own], together[own])


@pytest.mark.parametrize("which", ["key", "value"])
def test_nan_in_a_row_reaches_its_later_tokens_alone(which: str) -> None:
    args = whole_rows(16, 2, 16, torch.float32, 16)
    table, pages = args[4], args[1 if which == "key" else 2]
    pages[table[0, 3], 0, 5] = torch.nan  # token 53 of the first row, of one head
    pages[table[4, 3], 1, 2] = torch.inf  # token 50 of the fifth row, of the other
    out = run_on_device(attend_rows, *args)
    attend_paged_rows(*args)
    start, sees = query_start(WHOLE_COUNTS), args[3].isnan() | args[3].isinf()
    assert sees[:, :2].any(-1).any(-1).nonzero()[0] == 53 - 15
    assert sees[:, 2:].any(-1).any(-1).nonzero()[0] == start[4] + 50 - 46
    torch.testing.assert_close(out, args[3], equal_nan=True)


def test_nan_among_a_chunks_keys_reaches_those_that_see_it() -> None:
    config = small_config(topk=2, window_size=16)
    rows = draw_rows(config, [120], 16)
    rows.cache.append(rows.batch([120]))
    q = make_qkv(30, Hq=2)[0]
    flat = q[0].transpose(0, 1)
    selected = select_chunk(flat, rows.cache, rows.block_table[0], 120, 0.25)
    rows.cache.value[rows.block_table[0, 6]] = torch.nan  # tokens 96 to 111
    args = (flat, rows.cache.key, rows.cache.value, selected, rows.block_table[0], 120, 16, 0.25)
    out = run_on_device(lambda *x: launch(attend_paged_chunk, *x), *args)
    expected = attend_paged_chunk(*args)
    assert 0 < expected.isnan().sum() < expected.numel()
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_rows_with_more_queries_are_left_out() -> None:
    case = Case({}, 16, 5, whole_numbers=True)
    args = list(case.paged(COUNTS))
    everything = select_paged_blocks(*args)
    args[-2] = 3
    some = run_on_device(lambda *x: launch(select_paged_blocks, *x), *args)
    for row, (few, all_) in enumerate(
        zip(last_queries(some, COUNTS, 1), last_queries(everything, COUNTS, 1), strict=True)
    ):
        assert COUNTS[row] > 3 or torch.equal(few, all_)


@pytest.mark.skipif(not INTERPRETED, reason="guard pages surround CPU memory only")
def test_touches_nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case({}, 16, 2, D=24, lengths=FEW_LENGTHS)
    select = case.paged(FEW_COUNTS)
    attend = attend_args(case, FEW_COUNTS)[1]
    expected = select_paged_blocks(*select), attend_paged_blocks(*attend)
    whole = whole_rows(16, 2, 24, torch.float32, 16)
    attend_paged_rows(*whole[:3], expected_rows := whole[3].clone(), *whole[4:])
    with fenced_allocations(monkeypatch):
        launch(attend_paged_rows, *whole)
        selected = launch(select_paged_blocks, *select)
        out = launch(attend_paged_blocks, *attend)
    used = sum(FEW_COUNTS)
    assert torch.equal(selected[:, :used], expected[0][:, :used])
    torch.testing.assert_close(out[:used], expected[1][:used])
    torch.testing.assert_close(whole[3], expected_rows)
