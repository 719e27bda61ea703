import copy

import pytest
import torch

import infllm_flex as ifx
from tests.patch.models import LONG, SETTINGS, build, logits


@pytest.fixture(scope="module")
def plain():
    return logits(build(), LONG)


def test_dense_inside_sparse_outside(plain):
    model = ifx.patch_model(build(), SETTINGS)
    sparse = logits(model, LONG)
    with ifx.dense(model):
        assert torch.equal(logits(model, LONG), plain)
    assert torch.equal(logits(model, LONG), sparse)


def test_blocks_nest(plain):
    model = ifx.patch_model(build(), SETTINGS)
    with ifx.dense(model):
        with ifx.dense(model):
            pass
        assert torch.equal(logits(model, LONG), plain)
    assert not torch.equal(logits(model, LONG), plain)


def test_an_exception_ends_the_block(plain):
    model = ifx.patch_model(build(), SETTINGS)
    with pytest.raises(KeyError), ifx.dense(model):
        raise KeyError
    assert not torch.equal(logits(model, LONG), plain)


def test_patching_inside_keeps_the_block_dense_and_the_settings(plain):
    model = ifx.patch_model(build(), SETTINGS)
    with ifx.dense(model):
        ifx.patch_model(model, SETTINGS, topk=3)
        assert torch.equal(logits(model, LONG), plain)
    assert torch.equal(
        logits(model, LONG), logits(ifx.patch_model(build(), SETTINGS, topk=3), LONG)
    )


def test_unpatching_inside(plain):
    model = ifx.patch_model(build(), SETTINGS)
    with ifx.dense(model):
        ifx.unpatch_model(model)
    assert torch.equal(logits(model, LONG), plain)


def test_a_copy_made_inside_is_sparse(plain):
    model = ifx.patch_model(build(), SETTINGS)
    with ifx.dense(model):
        twin = copy.deepcopy(model)
    assert not torch.equal(logits(twin, LONG), plain)


def test_other_models_stay_sparse():
    model, other = (ifx.patch_model(build(), SETTINGS) for _ in range(2))
    sparse = logits(other, LONG)
    with ifx.dense(model):
        assert torch.equal(logits(other, LONG), sparse)


def test_an_unpatched_model():
    with (
        pytest.raises(ValueError, match="LlamaForCausalLM is not patched: it is dense already"),
        ifx.dense(build()),
    ):
        pass
