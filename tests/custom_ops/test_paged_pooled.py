"""Pooled queries over pages select what they select over one piece, bit for bit."""

import pytest
import torch

from infllm_flex.decoding import select_cached
from infllm_flex.decoding.paged.selection import select_chunk
from infllm_flex.selection import pool_queries as pool_for
from infllm_flex.selection import select_blocks
from infllm_flex_ops import pool_queries, select_paged_blocks_pooled, select_paged_chunk_pooled
from tests.inputs import make_qkv, small_config
from tests.paged import draw_rows, query_start

EVERY_KEY = {"pool_queries": True, "kernel_size": 1, "kernel_stride": 1}
PAIRS = {"pool_queries": True, "kernel_size": 2, "kernel_stride": 2, "score_dtype": "float8"}
SETTINGS = [
    EVERY_KEY,
    {**EVERY_KEY, "score_dtype": "float8", "dense_len": 100},
    {**EVERY_KEY, "init_blocks": 0, "window_size": 0, "topk": 5},
    {**EVERY_KEY, "block_size": 64, "window_size": 64, "topk": 2, "dense_len": 231},
    PAIRS,
    {**EVERY_KEY, "score_dims": 8},
    {**PAIRS, "score_dims": 4},
]
LENGTHS = [230, 17, 0, 64, 1, 231, 128]
COUNTS = [5, 3, 0, 1, 1, 5, 2]


def filled_rows(settings, lengths, page_size, **changes):
    rows = draw_rows(small_config(**settings), lengths, page_size, **changes)
    rows.cache.append(rows.batch(lengths))
    return rows


def flat(q, counts):
    """The last queries of each row, then two of no row."""
    n = q.shape[2]
    own = [q[row, :, n - count :].transpose(0, 1) for row, count in enumerate(counts)]
    own = torch.cat(own)
    return torch.cat([own, torch.full_like(own[:2], torch.nan)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_few_queries_get_the_lists_of_a_cache_in_one_piece(settings, page_size, G, dtype):
    rows = filled_rows(settings, LENGTHS, page_size, shared=1, dtype=dtype)
    config = rows.cache.config
    q = make_qkv(5, B=len(LENGTHS), Hq=2 * G, dtype=dtype)[0]
    capacity = rows.k.shape[2]
    expected = select_cached(q, rows.unpaged(config), capacity=capacity, key=rows.k)
    where = rows.block_table, rows.seq_lens, query_start(COUNTS)
    limits = config.dense_len, expected.shape[-1], 5, config.score_dtype == "float8"
    lists = select_paged_blocks_pooled(
        flat(q, COUNTS), rows.cache.scored, *where, *rows.cache.rule.pooled, *limits
    )
    for row, count in enumerate(COUNTS):
        own = slice(where[2][row], where[2][row + 1])
        assert torch.equal(lists[:, own], expected[row, :, 5 - count :])


@pytest.mark.parametrize("Sq", [230, 33])
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_chunk_gets_the_lists_of_a_whole_sequence(settings, page_size, Sq):
    rows = filled_rows(settings, [40, 230], page_size)
    config, table = rows.cache.config, rows.block_table[1]
    q, k = make_qkv(Sq, Hq=6)[0], rows.k[1:, :, :230]
    queries = q[0].transpose(0, 1)
    lists = select_chunk(queries, rows.cache, table, 230, 0.25)
    whole = select_blocks(q, k, config)[0]
    pooled = pool_for(q, 2, config)[0]
    alone = select_paged_chunk_pooled(pooled, rows.cache.scored, table, 230, *config_rule(config))
    assert torch.equal(alone, whole)
    few = select_paged_blocks_pooled(
        queries, rows.cache.scored, table[None], rows.seq_lens[1:], query_start([Sq]),
        *config_rule(config), config.dense_len, lists.shape[-1], Sq,
        config.score_dtype == "float8",
    )  # fmt: skip
    assert torch.equal(lists, few)


def config_rule(config):
    """The settings as the pooled operators take them."""
    budget = config.local_blocks, config.num_selected
    return (config.kernel_size, config.block_size, config.init_blocks, *budget)


def test_every_key_keeps_nothing_beside_the_cache():
    rows = draw_rows(small_config(**EVERY_KEY), [100], 16)
    assert rows.cache.compressed is None
    assert rows.cache.coarse is None
    assert rows.cache.scored is rows.cache.key
    before = rows.cache.key.clone()
    rows.cache.append(rows.batch([100]))
    assert torch.equal(rows.cache.key.nan_to_num(), before.nan_to_num())


def test_rows_with_more_queries_are_left_out():
    rows = filled_rows(EVERY_KEY, [64, 230, 100], 16)
    q = make_qkv(50, Hq=4)[0][0].transpose(0, 1)
    where = rows.block_table, rows.seq_lens, query_start([3, 40, 7])
    rule = config_rule(rows.cache.config)
    some, everything = (
        select_paged_blocks_pooled(q, rows.cache.key, *where, *rule, -1, 5, most, False)
        for most in (7, 40)
    )
    for own in (slice(0, 3), slice(43, 50)):
        assert torch.equal(some[:, own], everything[:, own])
    assert (some[:, 3:43] == -1).all()


def test_a_row_that_does_not_fit_its_table_is_refused():
    rows = filled_rows(EVERY_KEY, [64], 16, spare=0)
    where = rows.block_table, torch.tensor([65], dtype=torch.int32), query_start([1])
    q, rule = make_qkv(1)[0][0].transpose(0, 1), config_rule(rows.cache.config)
    with pytest.raises(ValueError, match="must hold the pages of 65 tokens in row 0, got 4 pages"):
        select_paged_blocks_pooled(q, rows.cache.key, *where, *rule, -1, 5, 1, False)


@pytest.mark.parametrize("settings", [EVERY_KEY, PAIRS], ids=str)
def test_are_registered_right(settings):
    rows = filled_rows(settings, [64, 100], 16)
    scored, rule = rows.cache.scored.nan_to_num(), config_rule(rows.cache.config)
    q = make_qkv(5, Hq=4)[0][0].transpose(0, 1).contiguous()
    where = rows.block_table.clamp(max=3), rows.seq_lens, query_start([2, 3])
    ops = torch.ops.infllm_flex
    few = (q, scored, *where, *rule, -1, 5, 3, False)
    torch.library.opcheck(ops.select_paged_blocks_pooled.default, few)
    pooled = q.transpose(0, 1).unflatten(0, (2, 2)).mean(1)
    chunk = (pooled, scored, where[0][1], 100, *rule)
    torch.library.opcheck(ops.select_paged_chunk_pooled.default, chunk)


def test_compile_as_one_graph():
    rows = filled_rows(EVERY_KEY, [64, 100], 16)
    q, rule = make_qkv(5, Hq=4)[0][0].transpose(0, 1), config_rule(rows.cache.config)
    where = rows.block_table, rows.seq_lens, query_start([2, 3])

    def step(q):
        few = select_paged_blocks_pooled(q, rows.cache.key, *where, *rule, -1, 5, 3, True)
        pooled = pool_queries(q.transpose(0, 1)[None], 2, False, 16)[0]
        table = rows.block_table[1]
        return few, select_paged_chunk_pooled(pooled, rows.cache.key, table, 100, *rule)

    for compiled, eager in zip(torch.compile(step, fullgraph=True)(q), step(q), strict=True):
        assert torch.equal(compiled, eager)
