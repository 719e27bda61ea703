import pytest
import torch

from infllm_flex import reference
from infllm_flex.decoding import select_cached
from infllm_flex_ops import attend_cached_blocks
from tests.custom_ops.cached import make_cache
from tests.inputs import small_config
from tests.tolerance import assert_within_rounding

ROWS = [(0, 230), (3, 230), (150, 230), (229, 230), (230, 230), (0, 17)]


def arguments(n=1, dtype=torch.float32, rows=ROWS, **shape):
    q, k, v, state = make_cache(small_config(dense_len=100), rows, 240, n=n, dtype=dtype, **shape)
    return [q, k, v, select_cached(q, state, capacity=240), state.start, state.end, 16, 0.25]


def exact_rows(args, dtype):
    """By the reference, row by row, in float64 arithmetic on ``dtype`` inputs."""
    q, k, v, selected, start, end, block_size, scale = args
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row, (first, last) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        here = min(q.shape[2], last - first)
        if here == 0:
            continue
        own = slice(row, row + 1)
        mine = [x[own, :, first:last].to(dtype) for x in (k, v)]
        query, chosen = q[own, :, -here:].to(dtype), selected[own, :, -here:]
        mask = reference.attention_mask(chosen, block_size, last - first)
        out[own, :, -here:] = reference.masked_attention(query, *mine, mask, scale=scale)
    return out


def plain_rows(args, dtype):
    """The same row by row, by plain arithmetic in ``dtype``."""
    q, k, v, selected, start, end, block_size, scale = args
    out = torch.zeros(q.shape, dtype=dtype)
    G = q.shape[1] // k.shape[1]
    for row, (first, last) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        here = min(q.shape[2], last - first)
        if here == 0:
            continue
        own = slice(row, row + 1)
        keys, values = (x[own, :, first:last].repeat_interleave(G, 1).to(dtype) for x in (k, v))
        chosen = selected[own, :, -here:]
        mask = reference.attention_mask(chosen, block_size, last - first).repeat_interleave(G, 1)
        logits = (q[own, :, -here:].to(dtype) @ keys.mT * scale).masked_fill(~mask, -torch.inf)
        out[own, :, -here:] = logits.softmax(-1) @ values
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 6])
def test_attends_to_the_listed_keys_of_each_row(n, dtype):
    args = arguments(n, dtype, Hq=6)
    out = attend_cached_blocks(*args)
    exact = exact_rows(args, dtype)
    assert out.dtype == dtype
    assert_within_rounding(out, exact, plain_rows(args, dtype))
    assert (out[4] == 0).all(), "no token"


def test_heads_may_list_differently_many_keys():
    args = arguments(rows=[(7, 230)])
    args[3][0, 1, 0, 3:] = -1
    exact, plain = exact_rows(args, torch.float32), plain_rows(args, torch.float32)
    assert_within_rounding(attend_cached_blocks(*args), exact, plain)
    args[3][0, 1] = -1
    out = attend_cached_blocks(*args)
    assert (out[0, 2:] == 0).all()
    assert (out[0, :2] != 0).any()


def test_any_strides():
    args = arguments(3)
    expected = attend_cached_blocks(*args)
    for i in range(3):
        args[i] = args[i].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attend_cached_blocks(*args), expected)


@pytest.mark.parametrize("stride", ["equal heads", "equal tokens"])
def test_a_cache_that_repeats_its_memory(stride):
    args = arguments(3, rows=[(7, 230), (3, 230)])
    for i in (1, 2):
        x = args[i]
        part = x[:, :1] if stride == "equal heads" else x[:, :, 229:230]
        args[i] = part.expand(x.shape)
    plain = [x.contiguous() if torch.is_tensor(x) else x for x in args]
    assert torch.equal(attend_cached_blocks(*args), attend_cached_blocks(*plain))


@pytest.mark.parametrize("n", [1, 3])
def test_is_registered_right(n):
    args = arguments(n, rows=ROWS[:2])
    for x in args[1:3]:
        x.nan_to_num_()
    torch.library.opcheck(torch.ops.infllm_flex.attend_cached_blocks.default, args)
