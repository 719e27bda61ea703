import pytest
import torch

from infllm_flex import reference
from infllm_flex_ops import attend_blocks
from infllm_flex_ops.block_attention import tile_chunks
from infllm_flex_ops.block_attention.attend_blocks import build_lists
from infllm_flex_ops.block_lists import union_lists
from infllm_flex_ops.sizes import group_size
from tests.inputs import make_qkv, make_selected
from tests.tolerance import assert_within_rounding

BLOCK = 16

SHAPES = [
    pytest.param({"S": 128, "Hq": 4, "Hkv": 2, "D": 16}, 4, id="aligned"),
    pytest.param({"S": 205, "Hq": 6, "Hkv": 2, "D": 24, "B": 2}, 7, id="ragged"),
    pytest.param({"S": 205, "Sq": 30, "Hq": 7, "Hkv": 1, "D": 40}, 32, id="last_queries"),
    pytest.param({"S": 90, "Hq": 2, "Hkv": 2, "D": 16}, 1, id="one_token"),
]


def make_case(shape, tile_tokens, dtype=torch.float32):
    qkv = make_qkv(**shape, dtype=dtype)
    S, Sq = shape["S"], qkv[0].shape[2]
    selected = make_selected(S, B=qkv[1].shape[0], Hkv=qkv[1].shape[1])[:, :, -Sq:]
    return qkv, selected, (selected, BLOCK, 0.25, tile_tokens)


def gradients(attend, qkv, grad_out):
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = attend(*leaves)
    out.backward(grad_out.to(out.dtype))
    return out.detach(), [x.grad for x in leaves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "tile_tokens"), SHAPES)
def test_is_masked_attention_with_its_gradients(shape, tile_tokens, dtype):
    qkv, selected, rest = make_case(shape, tile_tokens, dtype)
    mask = reference.attention_mask(selected, BLOCK, shape["S"])
    grad_out = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def plain(q, k, v):
        groups = q.shape[1] // k.shape[1]
        k, v, m = (x.repeat_interleave(groups, 1) for x in (k, v, mask))
        return (q @ k.mT * 0.25).masked_fill(~m, -torch.inf).softmax(-1) @ v

    def exact(q, k, v):
        return reference.masked_attention(q, k, v, mask, scale=0.25)

    out, grads = gradients(lambda q, k, v: attend_blocks(q, k, v, *rest)[0], qkv, grad_out)
    plain_out, plain_grads = gradients(plain, qkv, grad_out)
    exact_out, exact_grads = gradients(exact, [x.double() for x in qkv], grad_out)
    assert out.dtype == dtype
    assert_within_rounding(out, exact_out, plain_out)
    for grad, exact_grad, plain_grad in zip(grads, exact_grads, plain_grads, strict=True):
        assert grad.dtype == dtype
        assert_within_rounding(grad, exact_grad, plain_grad, factor=3)


def test_gradients_agree_with_finite_differences():
    qkv, _, rest = make_case({"S": 40, "Hq": 2, "Hkv": 1, "D": 4}, 4)
    leaves = [x.double().requires_grad_() for x in qkv]
    assert torch.autograd.gradcheck(lambda q, k, v: attend_blocks(q, k, v, *rest)[0], leaves)


@pytest.mark.parametrize("scores", [1, 50_000])
def test_chunks_of_tiles_join_seamlessly(monkeypatch, scores):
    qkv, selected, rest = make_case({"S": 205, "Hq": 4, "Hkv": 2, "D": 16}, 4)
    monkeypatch.setattr(tile_chunks, "CHUNK_SCORES", scores)
    mask = reference.attention_mask(selected, BLOCK, 205)
    exact = reference.masked_attention(*qkv, mask, scale=0.25)
    torch.testing.assert_close(attend_blocks(*qkv, *rest)[0].double(), exact, rtol=0, atol=1e-6)


def test_log_sum_exp_is_that_of_the_seen_keys():
    (q, k, v), selected, rest = make_case({"S": 100, "Hq": 2, "Hkv": 2, "D": 16}, 4)
    mask = reference.attention_mask(selected, BLOCK, 100)
    logits = (q.double() @ k.double().mT * 0.25).masked_fill(~mask, -torch.inf)
    lse = attend_blocks(q, k, v, *rest)[1]
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=0, atol=1e-5)


def test_a_query_without_keys_is_zero_and_has_no_gradient():
    (q, k, v), selected, _ = make_case({"S": 64, "Hq": 2, "Hkv": 2, "D": 16}, 4)
    selected[:, :, 17] = -1
    q.requires_grad_()
    out, lse = attend_blocks(q, k, v, selected, BLOCK, 0.25, 4)
    out.sum().backward()
    assert not out[:, :, 17].any()
    assert lse[:, :, 17].eq(-torch.inf).all()
    assert not q.grad[:, :, 17].any()
    assert q.grad.isfinite().all()


def test_blocks_not_chosen_never_matter():
    (q, k, v), selected, rest = make_case({"S": 205, "Hq": 4, "Hkv": 2, "D": 16}, 4)
    unchosen = torch.tensor([b for b in range(13) if b not in selected[0, 0, 150]])
    poisoned = v.clone()
    poisoned.unflatten(1, (2, 1))[0, 0, 0].index_fill_(
        0, (unchosen[:, None] * BLOCK + torch.arange(BLOCK)).flatten().clamp(max=204), 1e4
    )
    before, after = (attend_blocks(q, k, x, *rest)[0][0, :2, 150] for x in (v, poisoned))
    assert torch.equal(before, after)


def test_keys_no_one_chose_have_no_gradient():
    (q, k, v), selected, _ = make_case({"S": 64, "Hq": 2, "Hkv": 2, "D": 16}, 4)
    selected = torch.where(selected == 1, -1, selected)
    ascending = selected.masked_fill(selected < 0, 99).sort(-1).values
    selected = ascending.masked_fill(ascending == 99, -1)
    k.requires_grad_()
    v.requires_grad_()
    attend_blocks(q, k, v, selected, BLOCK, 0.25, 4)[0].sum().backward()
    assert not k.grad[:, :, 16:32].any()
    assert not v.grad[:, :, 16:32].any()
    assert k.grad[:, :, :16].any()


@pytest.mark.parametrize(
    ("tile_tokens", "unit", "tokens"), [(8, 64, 8), (9, 64, 8), (32, 48, 16), (64, 64, 64)]
)
def test_tiles_divide_the_unit_of_a_layout(tile_tokens, unit, tokens):
    assert union_lists.fit_unit(tile_tokens, unit) == tokens
    assert unit % union_lists.fit_unit(tile_tokens, unit) == 0


@pytest.mark.parametrize("unit", [None, 48])
@pytest.mark.parametrize(("shape", "tile_tokens"), SHAPES[:3])
def test_lists_built_beforehand_give_the_same_bits_and_gradients(shape, tile_tokens, unit):
    (q, k, v), selected, _ = make_case(shape, tile_tokens)
    lists = build_lists(group_size(q.shape[1], k.shape[1]), k, selected, BLOCK, unit=unit)
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))

    def itself(q, k, v):
        return attend_blocks(q, k, v, selected, BLOCK, 0.25, None, unit)[0]

    def ready(q, k, v):
        tokens, *built = lists
        return attend_blocks(q, k, v, selected, BLOCK, 0.25, tokens, unit, *built)[0]

    out, grads = gradients(itself, (q, k, v), grad_out)
    ready_out, ready_grads = gradients(ready, (q, k, v), grad_out)
    for x, y in zip((out, *grads), (ready_out, *ready_grads), strict=True):
        assert torch.equal(x, y)


def test_keeps_the_layout_of_the_query():
    (q, k, v), _, rest = make_case({"S": 90, "Hq": 4, "Hkv": 2, "D": 16}, 4)
    token_major = q.transpose(1, 2).contiguous().transpose(1, 2)
    out = attend_blocks(token_major, k, v, *rest)[0]
    assert out.stride() == token_major.stride()
    assert torch.equal(out, attend_blocks(q, k, v, *rest)[0])


@pytest.mark.parametrize("ready", [False, True])
def test_is_registered_right(ready):
    qkv, selected, rest = make_case({"S": 40, "Hq": 4, "Hkv": 2, "D": 8}, 4)
    lists = build_lists(2, qkv[1], selected, BLOCK, 4)[1:] if ready else ()
    torch.library.opcheck(
        torch.ops.infllm_flex.attend_blocks.default,
        (*(x.requires_grad_() for x in qkv), *rest, *((None, *lists) if ready else ())),
    )


def test_repairing_nonfinite_heads_is_registered_right():
    q, k, v = make_qkv(40, D=8)
    v[0, 0, 3] = torch.nan
    torch.library.opcheck(
        torch.ops.infllm_flex.repair_nonfinite_heads.default,
        (torch.zeros_like(q), q, k, v, make_selected(40), BLOCK, 0.25),
    )


def test_compiles_as_one_graph_with_its_backward():
    qkv, _, rest = make_case({"S": 40, "Hq": 4, "Hkv": 2, "D": 8}, 4)
    grad_out = torch.randn_like(qkv[0])

    def attend(q, k, v):
        return attend_blocks(q, k, v, *rest)[0]

    out, grads = gradients(attend, qkv, grad_out)
    compiled_out, compiled_grads = gradients(torch.compile(attend, fullgraph=True), qkv, grad_out)
    assert torch.equal(out, compiled_out)
    for x, y in zip(grads, compiled_grads, strict=True):
        assert torch.equal(x, y)
