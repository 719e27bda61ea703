"""The operators over pages give what the operators over one piece give, bit for bit."""

import pytest
import torch

from infllm_flex.decoding import select_cached
from infllm_flex.decoding.paged.selection import select_chunk
from infllm_flex_ops import (
    append_paged_windows,
    attend_blocks,
    attend_cached_blocks,
    attend_paged_blocks,
    attend_paged_chunk,
    attend_paged_rows,
    compress_keys,
    select_paged_blocks,
)
from infllm_flex_ops.pages import gather_windows
from tests.inputs import make_qkv, small_config
from tests.paged import draw_rows, query_start

# Pages of an eighth of a block up to several blocks, coarse windows every 16 tokens.
PAGES = [4, 8, 16, 32, 64]
LENGTHS = [230, 17, 0, 64, 1, 231, 128]


def written(rows, row, level):
    """The windows of a row that are whole, out of its pages."""
    cache = rows.cache
    pages, kind = (
        (cache.compressed, cache.rule.windows)
        if level == "compressed"
        else (cache.coarse, cache.rule.coarse_windows)
    )
    count = kind.num_visible(rows.lengths[row] - 1)
    return gather_windows(pages, rows.block_table[row], count, *kind, cache.page_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", PAGES)
def test_a_window_has_the_bits_of_compress_keys_however_tokens_come(page_size, dtype):
    rows = draw_rows(small_config(), LENGTHS, page_size, dtype=dtype)
    before = [0] * len(LENGTHS)
    for step in (1, 7, 40, 3, 90, 200):
        now = [min(length, done + step) for length, done in zip(LENGTHS, before, strict=True)]
        rows.cache.append(
            rows.batch([new - old for new, old in zip(now, before, strict=True)], now)
        )
        before = now
    for row, length in enumerate(LENGTHS):
        for level, sizes in (("compressed", (8, 4)), ("coarse", (32, 16))):
            expected = compress_keys(rows.k[row : row + 1, :, :length], *sizes)[0]
            assert torch.equal(written(rows, row, level), expected)


def test_nothing_but_the_completed_windows_is_written():
    rows = draw_rows(small_config(), [100], 32)
    rows.cache.append(rows.batch([20]))
    whole = sum(int((~x.isnan()).sum()) for x in (rows.cache.compressed, rows.cache.coarse))
    # Windows that end in tokens 80 to 99: five every 4 tokens, one every 16.
    assert whole == (5 + 1) * 2 * 16
    assert written(rows, 0, "compressed")[:, -5:].isfinite().all()
    assert written(rows, 0, "coarse")[:, -1].isfinite().all()


@pytest.mark.parametrize("page_size", PAGES)
def test_rows_that_share_a_prefix_share_its_windows(page_size):
    shared = 128 // page_size
    rows = draw_rows(small_config(), [200, 150, 230], page_size, shared=shared)
    rows.cache.append(rows.batch([200, 150 - 128, 230 - 128]))
    for row, length in enumerate(rows.lengths):
        for level, sizes in (("compressed", (8, 4)), ("coarse", (32, 16))):
            expected = compress_keys(rows.k[row : row + 1, :, :length], *sizes)[0]
            assert torch.equal(written(rows, row, level), expected)


SETTINGS = [
    {},
    {"lse": "exact", "init_blocks": 0},
    {"dense_len": 100},
    {"dense_len": 231},
    {"kernel_size": 12, "topk": 2, "window_size": 16},
    {"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "window_size": 0, "topk": 2},
]


@pytest.mark.parametrize("G", [1, 4, 16])
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("settings", SETTINGS)
def test_few_queries_get_the_bits_of_a_cache_in_one_piece(settings, page_size, G):
    config = small_config(**settings)
    rows = draw_rows(config, LENGTHS, page_size, shared=1)
    rows.cache.append(rows.batch(LENGTHS))
    state = rows.unpaged(config)
    n = 5
    q = make_qkv(n, B=len(LENGTHS), Hq=2 * G)[0]
    capacity = rows.k.shape[2]
    lists = select_cached(q, state, capacity=capacity, scale=0.25)
    out = attend_cached_blocks(
        q, rows.k, rows.v, lists, state.start, state.end, config.block_size, 0.25
    )
    counts = [5, 3, 0, 1, 1, 5, 2]
    flat = torch.cat([q[row, :, n - count :].transpose(0, 1) for row, count in enumerate(counts)])
    flat = torch.cat([flat, torch.full_like(flat[:2], torch.nan)])  # padding, in no row
    table, lens, start = rows.block_table, rows.seq_lens, query_start(counts)
    coarse = rows.cache.compressed if rows.cache.coarse is None else rows.cache.coarse
    selected = select_paged_blocks(
        flat, rows.cache.compressed, coarse, table, lens, start,
        *rows.cache.rule, config.dense_len, lists.shape[-1], n, 0.25,
    )  # fmt: skip
    attended = attend_paged_blocks(
        flat, rows.cache.key, rows.cache.value, selected, table, lens, start,
        config.block_size, n, 0.25,
    )  # fmt: skip
    for row, count in enumerate(counts):
        own = slice(start[row], start[row + 1])
        assert torch.equal(selected[:, own], lists[row, :, n - count :])
        assert torch.equal(attended[own], out[row, :, n - count :].transpose(0, 1))


def test_rows_with_more_queries_are_left_out():
    rows = draw_rows(small_config(), [64, 230, 100], 16)
    rows.cache.append(rows.batch([64, 230, 100]))
    q = make_qkv(50, Hq=4)[0][0].transpose(0, 1)
    rest = (*rows.cache.rule, -1, 5)
    cache, table, lens = rows.cache, rows.block_table, rows.seq_lens
    windows = cache.compressed, cache.coarse
    some = select_paged_blocks(q, *windows, table, lens, query_start([3, 40, 7]), *rest, 7, 0.25)
    everything = select_paged_blocks(
        q, *windows, table, lens, query_start([3, 40, 7]), *rest, 40, 0.25
    )
    for own in (slice(0, 3), slice(43, 50)):
        assert torch.equal(some[:, own], everything[:, own])
    assert (some[:, 3:43] == -1).all()


@pytest.mark.parametrize("page_size", [8, 16, 64])
@pytest.mark.parametrize(("dense_len", "Sq"), [(-1, 230), (-1, 33), (100, 230), (500, 100)])
def test_many_queries_get_the_bits_of_a_cache_in_one_piece(page_size, dense_len, Sq):
    config = small_config(dense_len=dense_len)
    rows = draw_rows(config, [40, 230], page_size)
    rows.cache.append(rows.batch([40, 230]))
    k, v = rows.k[1:, :, :230], rows.v[1:, :, :230]
    q = make_qkv(Sq, Hq=8)[0]
    flat = q[0].transpose(0, 1)
    selected = select_chunk(flat, rows.cache, rows.block_table[1], 230, 0.25)
    for i in range(Sq):
        position = 230 - Sq + i
        sees = torch.arange(selected.shape[-1]) <= position // 16
        if config.is_dense(position + 1):
            everything = torch.where(sees, torch.arange(selected.shape[-1]), -1)
            assert torch.equal(selected[:, i], everything.int().expand(2, -1))
    few = select_paged_blocks(
        flat, rows.cache.compressed, rows.cache.coarse, rows.block_table[1:],
        rows.seq_lens[1:], query_start([Sq]), *rows.cache.rule, dense_len,
        selected.shape[-1], Sq, 0.25,
    )  # fmt: skip
    assert torch.equal(selected, few)
    out = attend_paged_chunk(
        flat, rows.cache.key, rows.cache.value, selected, rows.block_table[1], 230, 16, 0.25
    )
    expected, _ = attend_blocks(q, k, v, selected[None], 16, 0.25)
    assert torch.equal(out, expected[0].transpose(0, 1))


@pytest.mark.parametrize("page_size", [8, 64])
def test_dense_rows_get_the_bits_of_a_chunk_and_others_are_left_alone(page_size):
    lengths, counts = [90, 100, 64, 30, 70, 0, 80], [40, 60, 5, 30, 70, 0, 20]
    rows = draw_rows(small_config(dense_len=91), lengths, page_size, shared=1)
    rows.cache.append(rows.batch(lengths))
    q = make_qkv(sum(counts), Hq=8)[0][0].transpose(0, 1)
    batch = rows.batch(counts)
    out = torch.full_like(q, 7.0)
    k, v = rows.cache.key, rows.cache.value
    attend_paged_rows(q, k, v, out, *batch[:3], 1, 5, 16, 17, 70, 90, 0.25)
    for row, length in enumerate(lengths):
        own = slice(batch.query_start[row], batch.query_start[row + 1])
        if row not in (3, 4):  # outside of the range, too long, too few
            assert (out[own] == 7.0).all()
            continue
        table = rows.block_table[row]
        selected = select_chunk(q[own], rows.cache, table, length, 0.25)
        chunk = attend_paged_chunk(q[own], k, v, selected, table, length, 16, 0.25)
        assert torch.equal(out[own], chunk)


def test_a_row_that_does_not_fit_its_table_is_refused():
    rows = draw_rows(small_config(), [64], 16, spare=0)
    with pytest.raises(ValueError, match="must hold the pages of 65 tokens in row 0, got 4 pages"):
        rows.cache.append(rows.batch([1], [65]))


def test_are_registered_right():
    rows = draw_rows(small_config(), [64, 100], 16)
    for x in (rows.cache.key, rows.cache.value, rows.cache.compressed, rows.cache.coarse):
        x.nan_to_num_()
    q = make_qkv(50, Hq=4)[0][0].transpose(0, 1)[:5].contiguous()
    cache, start = rows.cache, query_start([2, 3])
    where = rows.block_table.clamp(max=3), rows.seq_lens, start
    ops = torch.ops.infllm_flex
    windows = cache.compressed.contiguous(), cache.coarse.contiguous()
    append = (cache.key, *windows, *where, 3, 8, 4, 32, 16)
    torch.library.opcheck(ops.append_paged_windows.default, append)
    torch.library.opcheck(ops.append_paged_windows.default, (*append[:2], None, *append[3:]))
    select = (q, cache.compressed, cache.coarse, *where, *cache.rule, -1, 5, 3, 0.25)
    torch.library.opcheck(ops.select_paged_blocks.default, select)
    selected = select_paged_blocks(*select)
    attend = (q, cache.key, cache.value, selected, *where, 16, 3, 0.25)
    torch.library.opcheck(ops.attend_paged_blocks.default, attend)
    chunk = (q[2:], cache.key, cache.value, selected[:, 2:], where[0][1], 100, 16, 0.25)
    for queries in (q[2:], q[2:, :1].expand(-1, 4, -1), q[2:3].expand(3, -1, -1)):
        torch.library.opcheck(ops.attend_paged_chunk.default, (queries, *chunk[1:]))
    whole = (q, cache.key, cache.value, torch.zeros_like(q), *where, 0, 2, 16, 2, 3, 100, 0.25)
    torch.library.opcheck(ops.attend_paged_rows.default, whole)


def test_compile_as_one_graph():
    rows = draw_rows(small_config(), [64, 100], 16)
    q = make_qkv(5, Hq=4)[0][0].transpose(0, 1)
    batch = rows.batch([2, 3])

    def step(q):
        cache = rows.cache
        append_paged_windows(cache.key, cache.compressed, cache.coarse, *batch[:3], 3, 8, 4, 32, 16)
        return select_paged_blocks(
            q, cache.compressed, cache.coarse, *batch[:3], *cache.rule, -1, 5, 3, 0.25
        )

    rows.cache.append(rows.batch([64, 100]))
    assert torch.equal(torch.compile(step, fullgraph=True)(q), step(q))
