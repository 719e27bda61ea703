"""torch.func's reverse transforms equal plain backward; forward mode is refused, never dropped."""

import pytest
import torch
from torch.autograd import forward_ad

import infllm_flex_ops
from infllm_flex import InfLLMConfig, infllm_attention
from infllm_flex.decoding import CompressedKeys, decode_attention
from tests.inputs import make_qkv, make_selected, small_config

NO_JVP = "attend_blocks has no forward-mode derivative"


def attend(q, k, v, **overrides):
    return infllm_attention(q, k, v, small_config(**{"engine": "fused", **overrides}))


def plain_gradients(q, k, v):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attend(*leaves).square().sum(), leaves)


def squared(*qkv):
    return attend(*qkv).square().sum()


@pytest.mark.parametrize("lse", ["coarse", "exact"])
def test_grad_and_vjp_have_the_bits_of_backward(lse):
    qkv = make_qkv(205, B=2, Hq=6)
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = attend(*leaves, lse=lse)
    expected = torch.autograd.grad(out.square().sum(), leaves)
    found = torch.func.grad(lambda *x: attend(*x, lse=lse).square().sum(), (0, 1, 2))(*qkv)
    primal, pull_back = torch.func.vjp(lambda *x: attend(*x, lse=lse), *qkv)
    assert torch.equal(primal, out)
    for one, other, right in zip(found, pull_back(2 * primal), expected, strict=True):
        assert torch.equal(one, right)
        assert torch.equal(other, right)


def test_the_last_queries_have_the_jacobian_of_backward():
    q, k, v = make_qkv(120, Sq=3, Hq=2, Hkv=1, D=8)
    found = torch.func.jacrev(lambda v: attend(q, k, v)[..., 0])(v)
    expected = torch.autograd.functional.jacobian(lambda v: attend(q, k, v)[..., 0], v)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dims", [(0, 0, 0), (1, None, None), (None, 2, 0)])
def test_gradients_of_each_example_are_those_it_has_alone(dims):
    examples = [make_qkv(150, seed=seed) for seed in range(3)]
    parts = list(zip(*examples, strict=True))
    stacked = [
        part[0] if dim is None else torch.stack(part, dim)
        for part, dim in zip(parts, dims, strict=True)
    ]
    found = torch.func.vmap(torch.func.grad(squared, (0, 1, 2)), dims)(*stacked)
    for n in range(3):
        alone = [part[0] if dim is None else part[n] for part, dim in zip(parts, dims, strict=True)]
        for one, right in zip(found, plain_gradients(*alone), strict=True):
            torch.testing.assert_close(one[n], right, rtol=0, atol=1e-5)


def test_a_batch_without_gradients_goes_past_the_compiled_engine():
    qkv = [torch.stack([x, 2 * x]) for x in make_qkv(150)]
    found = torch.func.vmap(lambda *x: attend(*x, engine="auto"))(*qkv)
    assert torch.equal(found[1], attend(*(x[1] for x in qkv)))


def test_grad_compiles_as_one_graph():
    (q, k, v), config = make_qkv(120), small_config(engine="fused")
    gradient = torch.func.grad(lambda q: infllm_attention(q, k, v, config).square().sum())
    assert torch.equal(torch.compile(gradient, fullgraph=True)(q), plain_gradients(q, k, v)[0])


@pytest.mark.parametrize("engine", ["fused", "auto"])
@pytest.mark.parametrize("which", range(3))
def test_a_tangent_is_refused(which, engine):
    qkv = make_qkv(150)

    def through(x):
        return attend(*(x if n == which else y for n, y in enumerate(qkv)), engine=engine)

    x = qkv[which]
    with pytest.raises(NotImplementedError, match=NO_JVP):
        torch.func.jvp(through, (x,), (torch.ones_like(x),))
    with pytest.raises(NotImplementedError, match=NO_JVP), forward_ad.dual_level():
        through(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(NotImplementedError, match=NO_JVP), forward_ad.dual_level():
        through(forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x)))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_operator_called_by_its_name_refuses_too(requires_grad):
    q, k, v = make_qkv(90)
    q.requires_grad_(requires_grad)

    def through(k):
        return torch.ops.infllm_flex.attend_blocks(q, k, v, make_selected(90), 16, 0.25)[0]

    with pytest.raises(NotImplementedError, match=NO_JVP):
        torch.func.jvp(through, (k,), (k,))


def test_transforms_within_one_another_are_refused_not_zero():
    q, k, v = make_qkv(90)

    def cost(q):
        return squared(q, k, v)

    with pytest.raises(NotImplementedError, match=NO_JVP):
        torch.func.jvp(torch.func.grad(cost), (q,), (q,))
    with pytest.raises(NotImplementedError, match=NO_JVP):
        torch.func.grad(lambda q: torch.func.jvp(cost, (q,), (q,))[1])(q)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(lambda q: torch.func.grad(cost)(q).square().sum())(q)
    leaf = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(cost(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("n", [1, 2])
def test_a_decode_step_refuses_a_tangent(n):
    q, k, v = make_qkv(150, Sq=n)
    keys = CompressedKeys(small_config(), k)
    keys.append(k, 150)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda v: decode_attention(q, k, v, keys), (v,), (v,))
    with pytest.raises(NotImplementedError), forward_ad.dual_level():
        decode_attention(q, k, forward_ad.make_dual(v, v), keys)


def test_a_decode_operator_says_that_it_has_no_gradient():
    q, k, v = make_qkv(90, Sq=1)
    start, end = torch.zeros(1, dtype=torch.int64), torch.full((1,), 90)
    out = infllm_flex_ops.attend_cached_blocks(
        q.requires_grad_(), k, v, make_selected(90)[:, :, -1:], start, end, 16, 0.25
    )
    with pytest.raises(NotImplementedError, match="attend without a cache"):
        out.sum().backward()


def test_dense_attention_keeps_the_transforms_that_it_has():
    q, k, v = make_qkv(40, dtype=torch.float64)
    config = InfLLMConfig()
    found = torch.func.grad(lambda q: infllm_attention(q, k, v, config).square().sum())(q)
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(infllm_attention(leaf, k, v, config).square().sum(), leaf)
    assert torch.equal(found, expected)
