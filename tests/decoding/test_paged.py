"""Over pages a token attends as it would alone, however the tokens of its row came."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import infllm_flex.decoding.paged.attention as paged_module
import infllm_flex_ops
from infllm_flex import reference
from infllm_flex.decoding import (
    PagedBatch,
    PagedCache,
    allocate_windows,
    paged_attention,
    window_entries,
)
from tests.inputs import make_qkv, small_config
from tests.paged import allocate_pages, draw_rows, query_start
from tests.tolerance import assert_within_rounding
from tests.watch import WatchTensors

SCORINGS = [
    {"lse": "coarse"},
    {"lse": "exact"},
    {"pool_queries": True, "kernel_size": 1, "kernel_stride": 1},
    {"pool_queries": True, "kernel_size": 4, "kernel_stride": 4},
    {"pool_queries": True, "kernel_size": 1, "kernel_stride": 1, "score_dims": 8},
]


def refer(q, k, v, config):
    """Attend by the reference, each query dense or sparse by its position; and plainly in float32.

    ``q [Hq, S, D]`` and ``k`` and ``v [Hkv, S, D]`` of one row.
    """
    q, k, v = (x[None].float() for x in (q, k, v))
    S, scale = k.shape[2], q.shape[3] ** -0.5
    mask = torch.ones(1, k.shape[1], S, S, dtype=torch.bool).tril()
    first = max(config.dense_len - 1, 0)
    if first < S:
        selected = reference.select_blocks(q, k, config, scale=scale)
        sparse = reference.attention_mask(selected, config.block_size, S)
        mask[:, :, first:] = sparse[:, :, first:]
    exact = reference.masked_attention(q, k, v, mask, scale=scale)[0]
    G = q.shape[1] // k.shape[1]
    keys, values, mask = (x.repeat_interleave(G, 1) for x in (k, v, mask))
    logits = (q @ keys.mT * scale).masked_fill(~mask, -torch.inf)
    return exact, (logits.softmax(-1) @ values)[0]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=4),
    steps=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    dense_len=st.sampled_from([-1, 60, 200]),
    page_size=st.sampled_from([16, 32, 64]),
    group=st.sampled_from([1, 3, 4]),
    scoring=st.sampled_from(SCORINGS),
    seed=st.integers(0, 100),
)
def test_rows_of_any_lengths_in_any_chunks_attend_as_the_reference(
    lengths, steps, dense_len, page_size, group, scoring, seed
):
    config = small_config(dense_len=dense_len, **scoring)
    rows = draw_rows(config, [*lengths, 1], page_size, seed=seed)
    lengths = rows.lengths
    q = make_qkv(max(lengths), B=len(lengths), Hq=2 * group, seed=seed)[0]
    out = torch.full_like(q, torch.nan)
    before, turn = [0] * len(lengths), 0
    while before != lengths:
        # Rows move by different steps, so that few and many queries mix in one batch.
        now = [
            min(length, done + steps[(turn + row) % len(steps)])
            for row, (length, done) in enumerate(zip(lengths, before, strict=True))
        ]
        batch = rows.batch([new - old for new, old in zip(now, before, strict=True)], now)
        spans = list(enumerate(zip(before, now, strict=True)))
        query = torch.cat([q[row, :, a:b].transpose(0, 1) for row, (a, b) in spans])
        rows.cache.append(batch)
        attended = paged_attention(query, rows.cache, batch)
        for row, (a, b) in spans:
            own = slice(batch.query_start[row], batch.query_start[row + 1])
            out[row, :, a:b] = attended[own].transpose(0, 1)
        before, turn = now, turn + 1
    for row, length in enumerate(lengths):
        if length:
            mine = (x[row, :, :length] for x in (q, rows.k, rows.v))
            exact, plain = refer(*mine, config)
            assert_within_rounding(out[row, :, :length], exact, plain, factor=4)


def test_a_shared_prefix_is_never_compressed_again():
    config = small_config()
    rows = draw_rows(config, [200, 230], 32, shared=4)
    rows.cache.append(rows.batch([200, 0]))
    prefix = rows.block_table[1, :4].long()
    levels = rows.cache.compressed, rows.cache.coarse
    before = [x[prefix].clone() for x in levels]
    for x in levels:
        x[prefix] = 7.0
    rows.cache.append(rows.batch([0, 230 - 128]))
    for x, windows in zip(levels, before, strict=True):
        assert (x[prefix] == 7.0).all()
        x[prefix] = windows
    q = make_qkv(230, Hq=4)[0][0]
    query = q[:, -3:].transpose(0, 1)
    out = paged_attention(query, rows.cache, rows.batch([0, 3]))
    exact, plain = refer(q, rows.k[1, :, :230], rows.v[1, :, :230], config)
    assert_within_rounding(out, exact[:, -3:].transpose(0, 1), plain[:, -3:].transpose(0, 1))


@pytest.mark.parametrize("scoring", SCORINGS[::2], ids=str)
def test_steps_read_no_value(scoring):
    rows = draw_rows(small_config(**scoring), [200, 0, 64], 32)
    batch = PagedBatch.of_steps(rows.block_table, rows.seq_lens, query_start([1, 0, 1]), 1)
    rows.cache.append(rows.batch(rows.lengths))
    query = make_qkv(3, Hq=4)[0][0].transpose(0, 1)  # the last one is padding
    out = paged_attention(query, rows.cache, batch)
    assert torch.equal(out[:2], paged_attention(query, rows.cache, rows.batch([1, 0, 1]))[:2])
    fake = [x.to("meta") for x in (rows.block_table, rows.seq_lens, batch.query_start)]
    cache = PagedCache(
        rows.cache.config,
        *(x.to("meta") for x in (rows.cache.key, rows.cache.value)),
        *(None if x is None else x.to("meta") for x in (rows.cache.compressed, rows.cache.coarse)),
    )
    batch = PagedBatch.of_steps(*fake, 1)
    cache.append(batch)
    assert paged_attention(query.to("meta"), cache, batch).shape == query.shape


@pytest.mark.parametrize(
    ("dense_len", "shared_length", "together"),
    [(-1, 2048, 3), (100, 2048, 4), (1000, 2048, 5), (1000, 99, 4)],
)
def test_short_rows_that_attend_to_everything_take_one_call(
    monkeypatch, dense_len, shared_length, together
):
    monkeypatch.setattr(paged_module, "MAX_SHARED_LENGTH", shared_length)
    lengths, counts = [60, 40, 1, 80, 99, 0, 230], [30, 40, 1, 20, 60, 0, 50]
    config = small_config(dense_len=dense_len)  # selects 80 tokens
    rows = draw_rows(config, lengths, 16)
    rows.cache.append(rows.batch(lengths))
    query = make_qkv(sum(counts), Hq=4)[0][0].transpose(0, 1)
    calls = []
    for op in (infllm_flex_ops.attend_paged_rows, infllm_flex_ops.attend_paged_chunk):
        name = op.plain.__name__

        def count(*args, name=name, op=op):
            calls.append(name)
            return op(*args)

        monkeypatch.setattr(infllm_flex_ops, name, count)
    batch = rows.batch(counts)
    out = paged_attention(query, rows.cache, batch)
    assert calls == ["attend_paged_rows"] + ["attend_paged_chunk"] * (5 - together)
    for row, length in enumerate(lengths):
        own = slice(batch.query_start[row], batch.query_start[row + 1])
        if counts[row]:
            q = torch.zeros(4, length, 16)
            q[:, length - counts[row] :] = query[own].transpose(0, 1)
            exact, plain = refer(q, rows.k[row, :, :length], rows.v[row, :, :length], config)
            exact, plain = (x[:, length - counts[row] :].transpose(0, 1) for x in (exact, plain))
            assert_within_rounding(out[own], exact, plain, factor=4)


@pytest.mark.parametrize("scoring", SCORINGS[::2], ids=str)
def test_a_chunk_makes_nothing_of_the_size_of_all_pages(scoring):
    config = small_config(**scoring)
    rows = draw_rows(config, [300, 7, 4000], 64)
    rows.cache.append(rows.batch(rows.lengths))
    query = make_qkv(40, Hq=4)[0][0].transpose(0, 1)
    pages = rows.cache.key.untyped_storage().nbytes()
    with WatchTensors(rows.cache.key, rows.cache.value) as watch:
        paged_attention(query, rows.cache, rows.batch([40, 0, 0]))
    assert 0 < watch.largest_bytes < pages / 8


def test_windows_take_at_most_four_percent_of_the_cache_by_default():
    for page_size in (64, 128):
        entries = window_entries(small_config(**DEFAULTS), page_size)
        assert sum(entries) <= 0.04 * 2 * page_size
    assert window_entries(small_config(**DEFAULTS), 16) == (1, 1)
    assert window_entries(small_config(**DEFAULTS, lse="exact"), 64) == (4, 0)


DEFAULTS = {"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "window_size": 2048}


@pytest.mark.parametrize(
    ("settings", "page_size", "message"),
    [
        ({}, 6, "a page must hold a multiple of kernel_stride = 4 tokens, got 6"),
        ({}, 24, "a page must hold a multiple or a divisor of coarse_stride = 16 tokens, got 24"),
        ({"lse": "exact"}, 12, "a multiple or a divisor of block_size = 16 tokens, got 12"),
    ],
)
def test_a_page_that_does_not_fit_is_refused(settings, page_size, message):
    with pytest.raises(ValueError, match=message):
        window_entries(small_config(**settings), page_size)


@pytest.mark.parametrize("page_size", [0, -16])
def test_a_page_holds_tokens(page_size):
    with pytest.raises(ValueError, match=f"page_size must be 1 or more, got {page_size}"):
        window_entries(small_config(), page_size)


def test_every_key_scored_takes_nothing_of_the_cache():
    every_key = {"pool_queries": True, "kernel_size": 1, "kernel_stride": 1}
    assert window_entries(small_config(**every_key), 16) == (0, 0)
    assert window_entries(small_config(pool_queries=True, kernel_size=4), 16) == (4, 0)


@pytest.mark.parametrize(
    ("settings", "compressed", "coarse"),
    [
        ({}, (4, 16, torch.bfloat16), (1, 16, torch.bfloat16)),
        (SCORINGS[2], None, None),
        ({**SCORINGS[2], "score_dims": 4}, (16, 4, torch.bfloat16), None),
        (
            {**SCORINGS[2], "score_dims": 4, "score_dtype": "float8"},
            (16, 4, torch.float8_e4m3fn),
            None,
        ),
    ],
    ids=str,
)
def test_windows_are_allocated_as_the_settings_keep_them(settings, compressed, coarse):
    key = torch.zeros(3, 2, 16, 16, dtype=torch.bfloat16)
    windows = allocate_windows(small_config(**settings), key)
    PagedCache(small_config(**settings), key, key, *windows)  # which checks them
    for x, expected in zip(windows, (compressed, coarse), strict=True):
        found = None if x is None else (*x.shape[2:], x.dtype)
        assert found == expected


def test_settings_that_pages_do_not_serve_are_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"use_nope is not served .* after the rotary"):
        window_entries(small_config(use_nope=True), 16)


def test_views_that_do_not_fit_are_refused():
    config = small_config()
    cache = allocate_pages(config, 3, 16, 2, 16, torch.float32)
    views = {
        "key": cache.key,
        "value": cache.value,
        "compressed": cache.compressed,
        "coarse": cache.coarse,
    }
    for changed, message in (
        ({"key": cache.key[0]}, r"key must be \[P, Hkv, page, D\], got shape \(2, 16, 16\)"),
        ({"key": cache.key[:0]}, r"key must be \[P, Hkv, page, D\], got shape \(0, 2, 16, 16\)"),
        ({"key": cache.key.mT.contiguous().mT}, "key's heads must lie side by side, got stride 16"),
        ({"key": cache.key.long()}, "key must be floating point, got torch.int64"),
        ({"key": cache.key.repeat(1, 1, 1, 17)}, "head dim must be at most 256, got 272"),
        ({"value": cache.value[:2]}, r"value must be \[3, 2, 16, 16\], got \[2, 2, 16, 16\]"),
        ({"compressed": cache.coarse}, r"compressed must be \[3, 2, 4, 16\], got \[3, 2, 1, 16\]"),
        ({"coarse": None}, "coarse must hold 1 entries per page for these settings, got none"),
        (
            {"value": cache.value.half()},
            f"value must be torch.float32 on {cache.key.device} as key",
        ),
        ({"value": cache.value.mT.contiguous().mT}, "must lie side by side, got stride 16"),
    ):
        with pytest.raises(ValueError, match=message):
            PagedCache(config, **{**views, **changed})
    rows = draw_rows(config, [20], 16)
    for query, message in (
        (torch.zeros(1, 3, 16), r"\[T, Hq, D\] with Hq a multiple of 2 and D = 16, got"),
        (torch.zeros(1, 4, 16).half(), f"query must be torch.float32 on {cache.key.device} as the"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(query, rows.cache, rows.batch([1]))


@pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="a GPU's values are not read")
@pytest.mark.parametrize("scoring", SCORINGS[::2], ids=str)
def test_queries_that_no_tensor_holds_are_refused(scoring):
    rows = draw_rows(small_config(**scoring), [50, 40], 16)
    rows.cache.append(rows.batch([50, 40]))
    for counts in ([20, 2], [2, 20], [2, 3]):
        query = make_qkv(sum(counts))[0][0].transpose(0, 1)
        assert paged_attention(query, rows.cache, rows.batch(counts)).shape == query.shape
        with pytest.raises(ValueError, match=f"hold the {sum(counts)} queries of the rows, got"):
            paged_attention(query[:-1], rows.cache, rows.batch(counts))


def test_batches_that_do_not_fit_are_refused():
    rows = draw_rows(small_config(), [50, 40], 16)
    tensors = rows.block_table, rows.seq_lens, query_start([20, 2])
    shapes = r"must be \[B, max_pages\], \[B\] and \[B \+ 1\], got"
    for changed in (
        (tensors[0][0], *tensors[1:]),
        (tensors[0], tensors[1][:1], tensors[2]),
        (*tensors[:2], tensors[2][:2]),
        (*tensors[:2], tensors[2][None]),
    ):
        with pytest.raises(ValueError, match=shapes):
            PagedBatch.of_rows(*changed, [50, 40], [0, 20, 22])
        with pytest.raises(ValueError, match=shapes):
            PagedBatch.of_steps(*changed, 20)
    with pytest.raises(ValueError, match="got 1 rows and 2 queries in row 1"):
        PagedBatch.of_rows(tensors[0][:1], *tensors[1:], [50, 40], [0, 20, 22])
    with pytest.raises(ValueError, match=r"query_start must ascend, got \[20, 18\] in row 1"):
        PagedBatch.of_rows(*tensors, [50, 40], [0, 20, 18])
    with pytest.raises(ValueError, match="got 19 tokens and 20 queries in row 0"):
        PagedBatch.of_rows(*tensors, [19, 40], [0, 20, 22])
