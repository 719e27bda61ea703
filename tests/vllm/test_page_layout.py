"""Room for compressed keys behind a page's keys and values. Needs no vLLM."""

import dataclasses
import math

import pytest
import torch

from infllm_flex import InfLLMConfig, selection
from infllm_flex.vllm.page_layout import extra_elements, extra_share, smallest_page, view_pages

RELEASED = InfLLMConfig()  # the settings of the released checkpoints
EXACT = InfLLMConfig(lse="exact")
EVERY_KEY = InfLLMConfig(kernel_size=1, kernel_stride=1, pool_queries=True)
SLOWEST = dataclasses.replace(EVERY_KEY, score_dims=32)
KIND = torch.bfloat16, torch.device("cpu")
PAIRS = InfLLMConfig(kernel_size=2, kernel_stride=2, pool_queries=True)


@pytest.mark.parametrize("page", [64, 128, 256])
def test_compressed_keys_cost_less_than_a_twenty_fifth_of_a_page(page):
    assert extra_share(RELEASED, page) == (4 + 1) / (2 * 64)
    assert extra_share(RELEASED, page) <= 0.04
    assert extra_share(EXACT, page) == 4 / (2 * 64)


def test_a_page_shorter_than_a_block_costs_more():
    assert extra_share(RELEASED, 16) == (1 + 1) / (2 * 16)


@pytest.mark.parametrize(
    "config", [RELEASED, EXACT, InfLLMConfig(kernel_stride=32, block_size=96, window_size=0)]
)
def test_pages_of_the_smallest_size_hold_whole_blocks_and_steps(config):
    page = smallest_page(config)
    assert page % config.block_size == 0
    assert page % config.kernel_stride == 0
    assert config.lse == "exact" or page % config.coarse_stride == 0
    assert extra_elements(config, page, 2, 128, *KIND) % (2 * 128) == 0


@pytest.mark.parametrize("page", [8, 24, 48, 100])
def test_a_page_size_that_does_not_fit_is_an_error_of_one_line(page):
    with pytest.raises(ValueError, match=f"got {page}") as error:
        extra_share(RELEASED, page)
    assert "\n" not in str(error.value)


def make_cache(config, num_pages, heads, page, dim, *, room=None):
    """Pages as vLLM lays them out, followed by ``room`` elements, each element its own number."""
    kind = torch.float64, torch.device("cpu")
    room = extra_elements(config, page, heads, dim, *kind) if room is None else room
    stride = heads * page * 2 * dim + room
    memory = torch.arange(num_pages * stride, dtype=torch.float64)
    strides = (stride, page * 2 * dim, 2 * dim, 1)
    return memory, memory.as_strided((num_pages, heads, page, 2 * dim), strides)


@pytest.mark.parametrize("page", [16, 64, 128])
def test_every_key_scored_costs_nothing(page):
    assert extra_elements(EVERY_KEY, page, 2, 128, *KIND) == 0
    assert smallest_page(EVERY_KEY) == 64
    assert extra_share(PAIRS, page) == 1 / 4


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize(("score_dtype", "share"), [("same", 1 / 8), ("float8", 1 / 16)])
def test_a_copy_of_a_quarter_of_the_dims_costs_a_share(score_dtype, share, page, monkeypatch):
    config = dataclasses.replace(SLOWEST, score_dtype=score_dtype)
    room = extra_elements(config, page, 2, 128, *KIND)
    assert room == share * 2 * page * 2 * 128
    memory = torch.zeros(3, 2 * page * 2 * 128 + room + 8, dtype=torch.bfloat16)
    tokens = memory[:, : 2 * page * 2 * 128].unflatten(1, (2, page, 256))
    views = view_pages(tokens, config)
    assert views.compressed.shape == (3, 2, page, 32)
    views.compressed.copy_(torch.ones(32))
    assert (tokens == 0).all()
    assert (memory[:, -8:] == 0).all()
    assert (memory[:, -room - 8 : -8] != 0).all()
    monkeypatch.setattr(selection, "device_capability", lambda device: 80)  # has no float8
    gpu = torch.device("cuda")
    assert extra_elements(config, page, 2, 128, torch.bfloat16, gpu) == 2 * page * 32


@pytest.mark.parametrize(
    ("config", "count"),
    [(RELEASED, 4), (EXACT, 3), (PAIRS, 3), (EVERY_KEY, 2)],
    ids=["coarse", "exact", "pairs", "every_key"],
)
@pytest.mark.parametrize("page", [16, 64, 192])
def test_the_views_divide_the_memory_among_them(config, count, page):
    memory, cache = make_cache(config, num_pages=3, heads=2, page=page, dim=8)
    views = [view for view in view_pages(cache, config) if view is not None]
    assert len(views) == count
    assert torch.cat([view.flatten() for view in views]).sort().values.equal(memory)
    for view in views:
        assert view.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        per_page = memory.numel() // 3
        for number, rows in enumerate(view):
            assert (rows // per_page == number).all()


def test_the_views_have_keys_first_then_values():
    _, cache = make_cache(RELEASED, num_pages=2, heads=2, page=64, dim=8)
    views = view_pages(cache, RELEASED)
    assert views.key.equal(cache[..., :8])
    assert views.value.equal(cache[..., 8:])
    assert views.compressed.shape == (2, 2, 4, 8)
    assert views.coarse.shape == (2, 2, 1, 8)


@pytest.mark.parametrize("room", [0, 2 * (4 + 1) * 8 - 1])
def test_pages_without_enough_room_are_refused(room):
    _, cache = make_cache(RELEASED, num_pages=2, heads=2, page=64, dim=8, room=room)
    with pytest.raises(ValueError, match="with room for 80 elements"):
        view_pages(cache, RELEASED)


def test_pages_in_another_order_are_refused():
    shape = 2, 2, 64, 16
    by_token = torch.zeros(math.prod(shape)).view(2, 64, 2, 16).transpose(1, 2)
    assert by_token.shape == shape
    with pytest.raises(ValueError, match="VLLM_KV_CACHE_LAYOUT"):
        view_pages(by_token, RELEASED)
