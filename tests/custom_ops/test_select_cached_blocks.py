import sys

import pytest
import torch

from infllm_flex import reference
from infllm_flex.decoding import select_cached
from infllm_flex_ops import select_cached_blocks
from infllm_flex_ops.selection.rule import COLUMNS
from tests.custom_ops.cached import make_cache
from tests.inputs import small_config

definition = sys.modules["infllm_flex_ops.selection.select_cached_blocks"]

ROWS = [(0, 230), (3, 230), (150, 230), (229, 230), (230, 230), (0, 17)]


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lse": "exact", "init_blocks": 0},
        {"kernel_size": 12, "topk": 2, "window_size": 16},
        {"kernel_size": 32, "kernel_stride": 16, "window_size": 0, "topk": 2},
        {"dense_len": 100},
        {"dense_len": 231},
    ],
)
def test_selects_what_the_reference_selects_in_each_rows_own_tokens(settings, n):
    config = small_config(**settings)
    q, k, _, state = make_cache(config, ROWS, 240, n=n, Hq=6)
    selected = select_cached(q, state, capacity=240, scale=0.25)
    for row, (start, end) in enumerate(ROWS):
        length = end - start
        for i in range(n):
            position, found = length - n + i, selected[row, :, i]
            if position < 0:
                assert (found == -1).all()
            elif config.is_dense(position + 1):
                block = torch.arange(found.shape[-1])
                everything = torch.where(block <= position // 16, block, -1)
                assert torch.equal(found, everything.int().expand_as(found))
            else:
                own = k[row : row + 1, :, start : start + position + 1]
                query = q[row : row + 1, :, i : i + 1]
                expected = reference.select_blocks(query, own, config, scale=0.25)[0, :, 0]
                K = expected.shape[-1]
                assert torch.equal(found[:, :K], expected)
                assert (found[:, K:] == -1).all()


@pytest.fixture(params=[1, 2, 5, 16])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("groups", [1, 2, 3, 7, 16, 33])
@pytest.mark.parametrize("D", [16, 40, 64, 128, 256])
def test_few_rows_have_the_products_of_a_whole_tile(D, groups, num_threads):
    """Equal bits rest on this property of the machine's matrix products."""
    random = torch.Generator().manual_seed(0)
    width = groups * COLUMNS
    keys = torch.randn(2, width, D, generator=random)
    for tile_rows in (512, 511, 640):
        tile = torch.randn(tile_rows, D, generator=random)
        whole = torch.mm(tile, keys[0].t())
        for rows in (1, 2, 4, 5, 7, 16, 28, 64, 200):
            for few in (slice(rows), slice(tile_rows - rows, tile_rows)):
                product = definition.multiply(tile[few].expand(2, -1, -1), keys, width)
                assert torch.equal(product[0], whole[few])


def test_stale_windows_are_as_good_as_none():
    config = small_config()
    q, _, _, state = make_cache(config, [(0, 230)], 240)
    expected = select_cached(q, state, capacity=240)
    count = (230 - config.kernel_size) // config.kernel_stride + 1
    state.compressed[:, :, count:] = torch.nan
    state.coarse[:, :, (230 - config.coarse_size) // config.coarse_stride + 1 :] = torch.inf
    assert torch.equal(select_cached(q, state, capacity=240), expected)


def arguments(n=1):
    q, _, _, state = make_cache(small_config(), ROWS[:2], 240, n=n)
    windows = (state.compressed, state.coarse, state.start, state.end)
    return (q, *windows, 8, 4, 32, 16, 16, 1, 2, 5, 100, 7, 0.25)


def test_is_registered_right():
    torch.library.opcheck(torch.ops.infllm_flex.select_cached_blocks.default, arguments())


def test_compiles_as_one_graph():
    compiled = torch.compile(lambda *x: select_cached_blocks(*x) + 0, fullgraph=True)
    assert torch.equal(compiled(*arguments(2)), select_cached_blocks(*arguments(2)))
