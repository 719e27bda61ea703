"""The Triton kernels that pool queries and decode by them do what their definitions do."""

import pytest
import torch

from infllm_flex_ops.selection.pool_queries import pool_queries
from infllm_flex_ops.selection.select_cached_blocks_pooled import select_cached_blocks_pooled
from tests.custom_ops.harness import (
    DTYPES,
    INTERPRETED,
    fenced,
    fenced_allocations,
    require_kernels,
    run_on_device,
)
from tests.custom_ops.test_select_cached_blocks_pooled import arguments, draw_cache
from tests.inputs import make_qkv

require_kernels()
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),  # by numpy
]

from infllm_flex_ops.selection.kernels import pool_queries as pooling  # noqa: E402
from tests.custom_ops.selection_launches import launch_select_cached_pooled  # noqa: E402


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("G", "D"), [(1, 16), (3, 40), (16, 16)])
def test_pools_whole_numbers_as_the_definition(G: int, D: int, dtype: torch.dtype) -> None:
    q = (make_qkv(37, B=2, Hq=2 * G, D=D)[0] * 3).round().mul(G).to(dtype)  # whole means
    assert torch.equal(run_on_device(pooling.launch, q, 2, False, D), pool_queries(q, 2, False, D))


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize(("D", "num_dims"), [(40, 16), (128, 32), (24, 12)])
def test_pools_the_slowest_dims_as_the_definition(D: int, num_dims: int, float8: bool) -> None:
    q = (make_qkv(37, B=2, Hq=4, D=D)[0] * 3).round().mul(2)
    pooled = run_on_device(lambda q: pooling.launch(q, 2, float8, num_dims).float(), q)
    assert torch.equal(pooled, pool_queries(q, 2, float8, num_dims).float())


def test_rounds_to_float8_as_the_definition() -> None:
    """Every magnitude from the smallest step to the largest number, and ties between them."""
    bits = torch.arange(0, 127, dtype=torch.uint8)
    exact = bits.view(torch.float8_e4m3fn).float()
    between = (exact[1:] + exact[:-1]) / 2
    values = torch.cat([exact, between, between * (1 + 2**-12), between * (1 - 2**-12)])
    values = torch.cat([values, -values])
    q = torch.full((1, 1, len(values), 2), 200.0)  # so that nothing is scaled
    q[0, 0, :, 0] = values.clamp(-255.5, 255.5)
    rounded = run_on_device(lambda q: pooling.launch(q, 1, True, 2).float(), q)
    assert torch.equal(rounded, pool_queries(q, 1, True, 2).float())


@pytest.mark.parametrize("scale", [2.0**-30, 1.0, 3.0, 2.0**60])
def test_scales_rows_as_the_definition(scale: float) -> None:
    q = make_qkv(40)[0] * scale
    rounded = run_on_device(lambda q: pooling.launch(q, 4, True, 16).float(), q)
    assert torch.equal(rounded, pool_queries(q, 4, True, 16).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize(
    ("window", "n", "shape", "dense_len", "num_dims"),
    [
        (1, 1, {}, -1, None),
        (1, 6, {"Hq": 14, "D": 40}, 100, None),
        (4, 2, {"Hq": 2}, -1, None),
        (1, 20, {}, -1, None),
        (1, 3, {"D": 80}, -1, 32),
        (4, 1, {"D": 24}, 100, 12),
    ],
)
def test_selects_what_the_definition_selects(
    window: int,
    n: int,
    shape: dict[str, int],
    dense_len: int,
    num_dims: int | None,
    float8: bool,
    dtype: torch.dtype,
) -> None:
    kept = torch.float8_e4m3fn if float8 and num_dims else None
    sizes = {"whole_numbers": True, "num_dims": num_dims, "kept": kept, **shape}
    cache = draw_cache(window, n=n, dtype=dtype, **sizes)
    if shape.get("Hq", 4) > 2:  # means that both sides round in the same way
        cache[0].mul_(2)
    args = arguments(cache, window, dense_len, float8)
    assert torch.equal(
        run_on_device(launch_select_cached_pooled, *args), select_cached_blocks_pooled(*args)
    )


@pytest.mark.skipif(not INTERPRETED, reason="guard pages surround CPU memory only")
@pytest.mark.parametrize("num_dims", [None, 8])
def test_touches_nothing_outside(num_dims: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = draw_cache(1, n=2, D=24, whole_numbers=True, num_dims=num_dims)
    args = list(arguments(cache, 1, -1, True))
    args[1] = args[1].nan_to_num()
    args[3] = torch.full_like(args[3], 240)  # rows that fill the cache to its last slot
    expected = select_cached_blocks_pooled(*args)
    with fenced_allocations(monkeypatch):
        selected = launch_select_cached_pooled(
            *(fenced(x) if torch.is_tensor(x) else x for x in args)
        )
    assert torch.equal(selected, expected)
