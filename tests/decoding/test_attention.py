"""A step over a cache selects and attends as the full forward does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infllm_flex import (
    CompressedKeys,
    decode_attention,
    infllm_attention,
    reference,
    select_blocks,
)
from infllm_flex.decoding import select_cached
from infllm_flex.validation import resolve_scale
from infllm_flex_ops import attend_cached_blocks
from infllm_flex_ops.selection.pool_queries import round_to_float8
from tests.inputs import make_qkv, small_config
from tests.tolerance import assert_within_rounding
from tests.watch import WatchTensors


def chunks_of(length, sizes):
    """Cut ``length`` tokens into chunks of the sizes, cyclically."""
    begin, turn = 0, 0
    while begin < length:
        end = min(length, begin + sizes[turn % len(sizes)])
        yield begin, end
        begin, turn = end, turn + 1


def refer(q, k, v, config):
    """Attend by the reference, which runs on the CPU."""
    with torch.device("cpu"):
        return reference.attention(q.cpu(), k.cpu(), v.cpu(), config).to(q.device)


# Scores of each head, normalised by coarse or by compressed keys; scores of pooled queries with
# single keys, with single keys in float8, and with windows of keys.
SCORING = [
    {},
    {"lse": "exact"},
    {"pool_queries": True, "kernel_size": 1, "kernel_stride": 1},
    {"pool_queries": True, "kernel_size": 1, "kernel_stride": 1, "score_dtype": "float8"},
    {"pool_queries": True, "kernel_size": 4, "kernel_stride": 4},
    {"pool_queries": True, "kernel_size": 1, "kernel_stride": 1, "score_dims": 8},
    {
        "pool_queries": True,
        "kernel_size": 4,
        "kernel_stride": 4,
        "score_dims": 4,
        "score_dtype": "float8",
    },
]


@pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="equal bits are the CPU's")
@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 700),
    sizes=st.lists(st.integers(1, 33), min_size=1, max_size=3),
    pad=st.integers(0, 70),
    group=st.sampled_from([1, 2, 3, 5, 8]),
    head_dim=st.sampled_from([16, 24, 64]),
    scoring=st.sampled_from(SCORING),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
def test_chunk_by_chunk_the_choice_is_that_of_the_full_forward(
    length, sizes, pad, group, head_dim, scoring, dtype, seed
):
    config = small_config(**scoring)
    q, k, _ = make_qkv(length, Hq=2 * group, D=head_dim, dtype=dtype, seed=seed)
    whole = select_blocks(q, k, config)
    cache = torch.cat([torch.full_like(k[:, :, :1], torch.nan).expand(-1, -1, pad, -1), k], 2)
    state = CompressedKeys(config, cache)
    state.append(cache, pad, start=torch.tensor([pad]))
    for begin, end in chunks_of(length, sizes):
        state.append(cache, end - begin)
        chosen = select_cached(q[:, :, begin:end], state, capacity=cache.shape[2], key=cache)
        expected = whole[:, :, begin:end]
        K = expected.shape[-1]
        assert torch.equal(chosen[..., :K], expected)
        assert (chosen[..., K:] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scoring", [SCORING[0], SCORING[3]], ids=["heads", "pooled"])
@pytest.mark.parametrize("n", [1, 5])
def test_output_is_that_of_the_reference_over_each_rows_own_tokens(n, scoring, dtype):
    config = small_config(dense_len=100, **scoring)
    S, pads = 230, [0, 3, 129, 229]  # sparse, sparse, one more than dense allows, one token
    q, k, v = make_qkv(S, B=4, Sq=n, dtype=dtype)
    for row, pad in enumerate(pads):
        k[row, :, :pad] = v[row, :, :pad] = torch.nan
    room = torch.full((4, 2, 40, 16), torch.nan, dtype=dtype)  # a preallocated cache's tail
    cache = [torch.cat([x, room], 2) for x in (k, v)]
    state = CompressedKeys(config, cache[0])
    state.append(cache[0], S - n, start=torch.tensor(pads))
    state.append(cache[0], n)
    out = decode_attention(q, *cache, state)
    for row, pad in enumerate(pads):
        own = slice(row, row + 1)
        here = min(n, S - pad)
        for i in range(n - here, n):  # dense or sparse as it would be alone
            until = slice(pad, S - n + i + 1)
            mine = q[own, :, i : i + 1], k[own, :, until], v[own, :, until]
            exact = refer(*mine, config)
            plain = infllm_attention(*mine, config)
            assert_within_rounding(out[own, :, i : i + 1], exact, plain, factor=4)
        assert (out[own, :, : n - here] == 0).all(), "padding"


def test_a_row_turns_sparse_with_the_token_that_makes_it_long_enough():
    config = small_config(dense_len=120)
    q, k, v = make_qkv(125)
    state = CompressedKeys(config, k)
    state.append(k[:, :, :110], 110)
    for length in range(111, 126):
        mine = q[:, :, length - 1 : length], k[:, :, :length], v[:, :, :length]
        state.append(mine[1], 1)
        chosen = select_cached(mine[0], state, capacity=length)
        assert ((chosen >= 0).sum(-1) == (-(-length // 16) if length < 120 else 5)).all()
        exact = refer(*mine, config)
        out = decode_attention(*mine, state)
        assert_within_rounding(out, exact, infllm_attention(*mine, config))


def test_nothing_of_the_size_of_the_cache_is_made():
    config = small_config()
    q, k, v = make_qkv(8192, Sq=1)
    state = CompressedKeys(config, k)
    state.append(k, 8192)
    with WatchTensors(k, v, state.compressed, state.coarse) as watch:
        decode_attention(q, k, v, state)
    assert 0 < watch.largest_bytes < k.nbytes / 8


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 500),
    pad=st.integers(0, 30),
    group=st.sampled_from([1, 3, 4]),
    changes=st.sampled_from([{}, {"window_size": 0}, {"topk": 9}, {"dense_len": 200}]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_step_on_the_cpu_has_the_bits_of_the_operators(length, pad, group, changes, dtype):
    config = small_config(**changes)
    q, k, v = make_qkv(length + pad, B=2, Hq=2 * group, Sq=1, dtype=dtype)
    state = CompressedKeys(config, k)
    state.append(k, length + pad, start=torch.tensor([pad, 0]))
    selected = select_cached(q, state, capacity=k.shape[2])
    scale = resolve_scale(q, None)
    expected = attend_cached_blocks(q, k, v, selected, state.start, state.end, 16, scale)
    assert torch.equal(decode_attention(q, k, v, state), expected)


@pytest.mark.parametrize("dtypes", [(0, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0)], ids=str)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("scoring", SCORING, ids=str)
def test_autocast_gives_the_bits_of_inputs_cast_beforehand(n, dtypes, scoring):
    """Rotary embeddings leave queries and keys in float32 beside values in bfloat16."""
    config = small_config(**scoring)
    choice = torch.float32, torch.bfloat16
    qkv = [x.to(choice[i]) for x, i in zip(make_qkv(300, Sq=n, B=2), dtypes, strict=True)]
    rounded = [x.bfloat16() for x in qkv]
    state = CompressedKeys(config, rounded[1])
    state.append(rounded[1], 300, start=torch.tensor([0, 33]))
    expected = decode_attention(*rounded, state)
    device = qkv[0].device.type
    with torch.autocast(device, dtype=torch.bfloat16):
        ours = CompressedKeys(config, qkv[1])
        for begin in (0, 130, 137):
            ours.append(qkv[1], {0: 130, 130: 7, 137: 163}[begin], start=torch.tensor([0, 33]))
        kept = ours.compressed  # not rounded to float8 before it is multiplied
        kept = kept if kept.dtype == state.compressed.dtype else round_to_float8(kept)
        assert torch.equal(kept.float(), state.compressed.float())
        assert torch.equal(decode_attention(*qkv, ours), expected)
        with torch.autocast(device, enabled=False):
            before = CompressedKeys(config, qkv[1])
        before.append(qkv[1], 300)
        whole = infllm_attention(*(x[:1] for x in qkv), config)
        torch.testing.assert_close(decode_attention(*qkv, before)[:1], whole, rtol=0.02, atol=0.02)


def test_dtypes_that_do_not_fit_are_refused_where_nothing_casts_them():
    config = small_config()
    q, k, v = make_qkv(300, Sq=1)
    state = CompressedKeys(config, k)
    state.append(k, 300)
    for changed in ((q.bfloat16(), k, v), (q, k, v.bfloat16())):
        with pytest.raises(ValueError, match="must have one dtype"):
            decode_attention(*changed, state)
    with pytest.raises(ValueError, match=r"key must be .* torch.float32"):
        state.append(k.bfloat16(), 1)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("scoring", SCORING[::2], ids=str)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k, v[:, :1]), r"value must be \[2, 2, 90, 16\] on .* as key is"),
        (lambda q, k, v: (q, k, v.repeat(1, 2, 1, 1)), "value must be .*4, 90, 16"),
        (lambda q, k, v: (q, k, v[:1]), "value must be .*1, 2, 90, 16"),
        (lambda q, k, v: (q, k, v[:, :, 1:]), "value must be .*2, 2, 89, 16"),
        (lambda q, k, v: (q, k, v[..., 1:]), "value must be .*2, 2, 90, 15"),
        (lambda q, k, v: (q, k, v[0]), "value must be .*2, 90, 16"),
        (lambda q, k, v: (q[:1], k[:1], v[:1]), r"key must be \[2, 2, S, 16\]"),
        (lambda q, k, v: (q, k[:, :1], v[:, :1]), r"key must be \[2, 2, S, 16\]"),
        (lambda q, k, v: (q[..., 1:], k[..., 1:], v[..., 1:]), r"key must be \[2, 2, S, 16\]"),
    ],
)
def test_a_cache_that_does_not_fit_its_compressed_keys_is_refused(change, message, scoring, n):
    q, k, v = make_qkv(90, B=2, Sq=n)
    state = CompressedKeys(small_config(**scoring), k)
    state.append(k, 80)
    with pytest.raises(ValueError, match=message):
        decode_attention(*change(q, k, v), state)


@pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="a GPU's values are not read")
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("scoring", SCORING, ids=str)
def test_rows_longer_than_the_cache_are_refused(scoring, n):
    q, k, v = make_qkv(170, B=2, Sq=n)
    state = CompressedKeys(small_config(**scoring), k)
    state.append(k, 170)
    with pytest.raises(ValueError, match=r"k must hold 170 slots in row 0, got 169|width must be"):
        decode_attention(q, k[:, :, :169], v[:, :, :169], state)
    with pytest.raises(ValueError, match="width must be 5 or more, the longest list, got 3"):
        select_cached(q, state, capacity=40, key=k)


@pytest.mark.parametrize(
    ("change", "capacity", "message"),
    [
        (lambda q: q[:1], 90, r"query must be \[2, Hq, n, 16\] with Hq a multiple of 2, got \[1,"),
        (lambda q: q[:, 1:], 90, r"query must be .* got \[2, 3, 1, 16\]"),
        (lambda q: q[..., 1:], 90, r"query must be .* got \[2, 4, 1, 15\]"),
        (lambda q: q[0], 90, r"query must be .* got \[4, 1, 16\]"),
        (lambda q: q, 0, "capacity must be 1 or more, got 0"),
    ],
)
def test_queries_that_do_not_fit_the_compressed_keys_are_refused(change, capacity, message):
    q, k, _ = make_qkv(90, B=2, Sq=1)
    state = CompressedKeys(small_config(), k)
    state.append(k, 90)
    with pytest.raises(ValueError, match=message):
        select_cached(change(q), state, capacity=capacity)
