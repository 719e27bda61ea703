"""A decode step by pooled queries selects what the whole sequence selects at that position."""

import pytest
import torch

from infllm_flex_ops import compress_keys, select_blocks_pooled, select_cached_blocks_pooled
from infllm_flex_ops.selection.pool_queries import pool_queries, round_to_float8
from infllm_flex_ops.selection.rotary_dims import slowest_dims
from tests.inputs import make_qkv

S = 240
ROWS = [(0, 230), (3, 230), (150, 230), (229, 230), (230, 230), (0, 17)]
RULE = {"block_size": 16, "init_blocks": 1, "local_blocks": 2, "num_selected": 5}


def draw_cache(
    window, *, n=1, dtype=torch.float32, whole_numbers=False, num_dims=None, kept=None, **shape
):
    """Queries, compressed keys and counters of rows of every kind, nan outside of them.

    With ``num_dims`` compressed keys have the slowest dims alone, in the dtype ``kept``.
    """
    q, k, _ = make_qkv(S, B=len(ROWS), Sq=n, dtype=dtype, **shape)
    if whole_numbers:
        q, k = ((x * 2).round() for x in (q, k))
    for row, (start, end) in enumerate(ROWS):
        k[row, :, :start] = k[row, :, end:] = torch.nan
    compressed = k
    if window > 1 or num_dims:
        num_dims, size = num_dims or k.shape[3], S // window + 3
        compressed = torch.full((len(ROWS), k.shape[1], size, num_dims), torch.nan, dtype=dtype)
        for row, (start, end) in enumerate(ROWS):
            keys = slowest_dims(k[row : row + 1, :, start:end], num_dims)
            windows = compress_keys(keys, window, window)[0]
            compressed[row, :, : windows.shape[1]] = windows.round() if whole_numbers else windows
        compressed = compressed if kept is None else round_to_float8(compressed)
    start, end = (torch.tensor(x) for x in zip(*ROWS, strict=True))
    return q, k, compressed, start, end


def arguments(cache, window, dense_len, float8):
    q, _, compressed, start, end = cache
    width = max(RULE["num_selected"], -(-(dense_len - 1) // 16))
    return (q, compressed, start, end, window, *RULE.values(), dense_len, width, float8)


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize(
    ("window", "n", "shape", "num_dims"),
    [
        (1, 1, {}, None),
        (1, 6, {"Hq": 14}, None),
        (4, 3, {"D": 40}, None),
        (1, 2, {"D": 24}, 8),
        (4, 3, {}, 4),
    ],
)
def test_has_the_bits_of_the_whole_sequence(window, n, shape, num_dims, float8):
    kept = torch.float8_e4m3fn if float8 and num_dims else None
    cache = draw_cache(window, n=n, num_dims=num_dims, kept=kept, **shape)
    q, k = cache[:2]
    num_dims = num_dims or q.shape[3]
    selected = select_cached_blocks_pooled(*arguments(cache, window, -1, float8))
    for row, (start, end) in enumerate(ROWS):
        count = min(n, end - start)
        if count == 0:
            assert (selected[row] == -1).all()
            continue
        keys = k[row : row + 1, :, start:end]
        keys = compress_keys(keys, window, window) if window > 1 else keys
        keys = slowest_dims(keys, num_dims)
        keys = round_to_float8(keys) if float8 else keys
        pooled = pool_queries(q[row : row + 1, :, n - count :], 2, float8, num_dims)
        alone = select_blocks_pooled(pooled, keys, end - start, window, *RULE.values())
        assert torch.equal(selected[row, :, n - count :, : alone.shape[-1]], alone[0])
        assert (selected[row, :, n - count :, alone.shape[-1] :] == -1).all()


def test_dense_queries_list_every_block():
    cache = draw_cache(1, n=3)
    selected = select_cached_blocks_pooled(*arguments(cache, 1, 230, False))
    assert selected[0, 0, 0].tolist() == [*range(15)]
    assert len(set(selected[0, 0, 2].tolist()) - {-1}) == 5
    assert selected[2, 0, 2].tolist()[:5] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("window", [1, 4])
def test_is_registered_right(window):
    args = arguments(draw_cache(window), window, 100, False)
    args = (args[0], args[1].nan_to_num(), *args[2:])
    torch.library.opcheck(torch.ops.infllm_flex.select_cached_blocks_pooled.default, args)
