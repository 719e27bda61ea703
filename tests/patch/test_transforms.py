"""Patched models under torch.func: per-example gradients, and an error instead of lost tangents."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jvp, vmap

import infllm_flex as ifx
from tests.patch.models import LONG, SETTINGS, build, tokens


@pytest.fixture
def model():
    return ifx.patch_model(build("qwen3"), SETTINGS)


def cost_with(model):
    def cost(weights, ids):
        logits = functional_call(model, weights, (ids[None],), {"use_cache": False}).logits
        return F.cross_entropy(logits[0, :-1], ids[1:])

    return cost


def test_each_example_has_the_gradients_it_has_alone(model):
    ids = tokens(LONG, 2)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    found = vmap(grad(cost_with(model)), (None, 0))(weights, ids)
    for n, row in enumerate(ids):
        model.zero_grad()
        logits = model(row[None], use_cache=False).logits
        F.cross_entropy(logits[0, :-1], row[1:]).backward()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(found[name][n], weight.grad, rtol=1e-4, atol=1e-5)


def test_a_tangent_of_the_weights_is_refused(model):
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    ids = tokens(LONG, 1)[0]
    with pytest.raises(NotImplementedError, match="attend_blocks has no forward-mode derivative"):
        jvp(lambda weights: cost_with(model)(weights, ids), (weights,), (weights,))
