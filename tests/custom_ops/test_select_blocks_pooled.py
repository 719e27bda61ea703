import itertools

import pytest
import torch

from infllm_flex import CompressedKeys, reference
from infllm_flex import select_blocks as select_for
from infllm_flex.decoding import select_cached
from infllm_flex.selection import compress_for_pooled
from infllm_flex_ops import pool_queries, select_blocks_pooled
from tests.inputs import make_qkv, small_config

SHAPES = [
    pytest.param({"S": 200, "B": 2}, id="aligned"),
    pytest.param({"S": 205, "Sq": 70, "Hq": 6, "D": 24}, id="last_queries"),
    pytest.param({"S": 205, "Sq": 1, "Hq": 7, "Hkv": 1}, id="one_query"),
    pytest.param({"S": 1, "Hq": 1, "Hkv": 1}, id="one_token"),
]


def pooled_config(window=1, **overrides):
    windows = {"kernel_size": window, "kernel_stride": window}
    return small_config(pool_queries=True, **windows, **overrides)


@pytest.mark.parametrize("score_dims", [0, 4, 12])
@pytest.mark.parametrize("score_dtype", ["same", "float8"])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_selects_what_the_reference_selects(shape, window, score_dtype, score_dims):
    config = pooled_config(window, score_dtype=score_dtype, score_dims=score_dims)
    q, k, _ = make_qkv(**shape)
    expected = reference.select_blocks(q, k, config, scale=0.25)
    assert torch.equal(select_for(q, k, config, scale=0.25), expected)


@pytest.mark.parametrize(("D", "Sq"), [(1, 205), (1, 3), (2, 205)])
def test_zeros_of_either_sign_are_a_tie(D, Sq):
    """A query of zero times a key is zero with the sign of the key."""
    config = pooled_config(4)
    q, k, _ = make_qkv(205, Sq=Sq, D=D)
    expected = reference.select_blocks(q * 0, k, config, scale=0.25)
    assert torch.equal(select_for(q * 0, k, config), expected)
    assert expected[0, 0, -1].tolist() == [0, 1, 10, 11, 12]


def test_with_one_head_to_a_group_and_the_exact_normaliser_it_is_the_method_without_pooling():
    q, k, _ = make_qkv(405, Hq=2)
    plain = small_config(kernel_size=4, lse="exact")
    assert torch.equal(select_for(q, k, pooled_config(4)), select_for(q, k, plain))


def test_finds_a_single_key_that_a_window_of_eight_hides():
    """The query matches one key; its neighbours point the other way."""
    _, k, _ = make_qkv(405, Hkv=1)
    q = torch.zeros(1, 4, 405, 16)
    q[..., 0] = 1.0
    k[0, 0, :, 0] = 0.0
    k[0, 0, 96:112, 0] = -1.0
    k[0, 0, 101, 0] = 5.0
    fine = select_for(q, k, pooled_config(window_size=0, topk=2))
    coarse = select_for(q, k, small_config(window_size=0, topk=2))
    assert fine[0, 0, -1].tolist() == [0, 25]  # the first and the own block: the budget is forced
    fine = select_for(q, k, pooled_config(window_size=0, topk=3))
    coarse = select_for(q, k, small_config(window_size=0, topk=3))
    assert 6 in fine[0, 0, -1].tolist()
    assert 6 not in coarse[0, 0, -1].tolist()


def test_a_row_depends_on_nothing_but_its_past():
    config = pooled_config(score_dtype="float8")
    q, k, _ = make_qkv(405, B=3, Hq=6)
    whole = select_for(q, k, config)
    assert torch.equal(select_for(q[1:2], k[1:2], config), whole[1:2]), "batch"
    assert torch.equal(select_for(q[:, :3], k[:, :1], config), whole[:, :1]), "heads"
    for end in (130, 257, 404):
        shorter = select_for(q[:, :, :end], k[:, :, :end], config)
        K = shorter.shape[-1]
        assert torch.equal(shorter, whole[:, :, :end, :K]), "later tokens"
        for begin in (0, 1, 100, end - 1):
            chunk = select_for(q[:, :, begin:end], k[:, :, :end], config)
            assert torch.equal(chunk, shorter[:, :, begin:]), "chunk"


@pytest.mark.parametrize("G", [1, 5, 7, 8, 16, 33])
@pytest.mark.parametrize("float8", [False, True])
def test_a_pooled_query_depends_on_nothing_but_its_heads(G, float8):
    q, _, _ = make_qkv(41, B=2, Hq=2 * G, D=24)
    whole = pool_queries(q, 2, float8, 24).float()
    exact = q.double().unflatten(1, (2, G)).mean(2)
    assert float8 or torch.allclose(whole.double(), exact, rtol=0, atol=1e-6)
    for order in ((0, 2, 1, 3), (2, 3, 0, 1), (0, 1, 3, 2)):
        laid_out = q.permute(order).contiguous().permute(sorted(range(4), key=order.__getitem__))
        assert torch.equal(pool_queries(laid_out, 2, float8, 24).float(), whole), order
        for begin, end in ((0, 1), (7, 8), (3, 40)):
            chunk = pool_queries(laid_out[:, :, begin:end], 2, float8, 24).float()
            assert torch.equal(chunk, whole[:, :, begin:end]), (order, begin)


def test_blocks_that_differ_by_a_rounding_are_selected_alike_in_whole_and_in_part():
    config = pooled_config(block_size=4, window_size=4, topk=4)
    q, base, _ = make_qkv(90, Hq=16)
    random = torch.Generator().manual_seed(0)
    steps = torch.randint(-2, 3, (1, 2, 90, 16), generator=random)
    k = base[:, :, :1] * (1 + steps * torch.finfo(torch.float32).eps / 2)
    whole = select_for(q, k, config)
    for begin, end in ((30, 31), (50, 53), (89, 90)):
        chunk = select_for(q[:, :, begin:end], k[:, :, :end], config)
        assert torch.equal(chunk, whole[:, :, begin:end])
    state = CompressedKeys(config, k)
    for length in range(30, 91):
        state.append(k, 30 if length == 30 else 1, end=torch.tensor(length))
        step = select_cached(q[:, :, length - 1 : length], state, capacity=90, key=k)
        assert torch.equal(step, whole[:, :, length - 1 : length])


def test_dims_that_turn_fast_do_not_matter():
    """A rotary embedding turns dims i and i + 8 by position / 10000 ** (i / 8)."""
    q, k, _ = make_qkv(405)
    other_q, other_k = q.clone(), k.clone()
    fast = [*range(6), *range(8, 14)]
    for other in (other_q, other_k):
        other[..., fast] = torch.randn_like(other[..., fast]) * 10
    config = pooled_config(score_dims=4)
    selected = select_for(q, k, config)
    assert torch.equal(select_for(other_q, other_k, config), selected)
    assert not torch.equal(select_for(other_q, other_k, pooled_config()), selected)
    slow = [6, 7, 14, 15]
    assert torch.equal(select_for(q[..., slow], k[..., slow], pooled_config()), selected)


def test_more_dims_than_the_head_has_are_refused():
    q, k, _ = make_qkv(40)
    message = "score_dims must be less than the head dim, an even number, got 16 for heads of 16"
    with pytest.raises(ValueError, match=message):
        select_for(q, k, pooled_config(score_dims=16))
    with pytest.raises(ValueError, match=message):
        CompressedKeys(pooled_config(score_dims=16), k)
    with pytest.raises(ValueError, match="got 4 for heads of 15"):
        select_for(q[..., :15], k[..., :15], pooled_config(score_dims=4))


@pytest.mark.parametrize("factor", [2.0**-9, 2.0**40])
def test_the_length_of_a_query_does_not_matter(factor):
    q, k, _ = make_qkv(405)
    for score_dtype in ("same", "float8"):
        config = pooled_config(score_dtype=score_dtype)
        assert torch.equal(select_for(q * factor, k, config), select_for(q, k, config))


def test_zero_queries_and_huge_keys_still_choose():
    config = pooled_config(score_dtype="float8", window_size=0, topk=4)
    q, k, _ = make_qkv(205)
    assert select_for(q * 0, k, config)[0, 0, -1].tolist() == [0, 1, 2, 12]
    assert (select_for(q, k * 1e6, config) >= 0).any()


def test_a_nan_changes_no_row_before_it_and_no_other_head():
    config = pooled_config()
    q, k, _ = make_qkv(205)
    poisoned = k.clone()
    poisoned[0, 1, 150] = torch.nan
    clean, after = select_for(q, k, config), select_for(q, poisoned, config)
    assert torch.equal(after[:, 0], clean[:, 0])
    assert torch.equal(after[:, 1, :150], clean[:, 1, :150])
    assert ((after >= -1) & (after <= 12)).all()


@pytest.mark.parametrize("packed", [True, False])
def test_sequences_select_as_if_alone(packed):
    config = pooled_config(score_dtype="float8")
    q, k, _ = make_qkv(405, Hq=6)
    bounds = [0, 170, 171, 405]
    if packed:
        selected = select_for(q, k, config, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    else:
        mask = torch.zeros(1, 405, dtype=torch.int64)
        mask[:, 171:] = 1
        selected, bounds = select_for(q, k, config, attention_mask=mask), [171, 405]
    for begin, end in itertools.pairwise(bounds):
        alone = select_for(q[:, :, begin:end], k[:, :, begin:end], config)
        assert torch.equal(selected[:, :, begin:end, : alone.shape[-1]], alone)
        assert (selected[:, :, begin:end, alone.shape[-1] :] == -1).all()


PARTS = torch.tensor([[[0, 60, 5], [0, 60, 5], [64, 80, 5], [0, 0, 0]]], dtype=torch.int32)


@pytest.mark.parametrize("documents", [None, PARTS])
def test_is_registered_right(documents):  # the checks themselves know no float8
    config = pooled_config()
    q, k, _ = make_qkv(128)
    args = (pool_queries(q, 2, False, 16), compress_for_pooled(k, config), 128, 1, 16, 1, 2, 5)
    torch.library.opcheck(torch.ops.infllm_flex.select_blocks_pooled.default, (*args, documents))


def test_compiles_as_one_graph():
    q, k, _ = make_qkv(205)
    config = pooled_config(score_dtype="float8")
    compiled = torch.compile(lambda q, k: select_for(q, k, config), fullgraph=True)
    assert torch.equal(compiled(q, k), select_for(q, k, config))


def test_refuses_parts_that_do_not_fit():
    q, k, _ = make_qkv(80)
    documents = torch.zeros(1, 3, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="got 3 parts and queries from position 0"):
        select_blocks_pooled(q[:, :2], k, 80, 1, 16, 1, 2, 5, documents)
