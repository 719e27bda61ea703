"""A patched model does the least that it must with any version of PyTorch and transformers.

``scripts/test_private_apis`` runs this; what it leaves out, the tests beside it have.
"""

import pytest
import torch

import infllm_flex
from tests.tiny_model import SPARSE_CONFIG, tiny_config

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.private_api

SHORT, LONG = 80, 200


@pytest.fixture
def models():
    """One model, dense and patched."""
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(tiny_config()).eval()
    patched = transformers.LlamaForCausalLM(tiny_config()).eval()
    patched.load_state_dict(dense.state_dict())
    infllm_flex.patch_model(patched, **SPARSE_CONFIG)
    return dense, patched


def draw_tokens(B, S):
    return torch.randint(2, 258, (B, S), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_patched_model_is_dense_when_short_and_sparse_when_long(models):
    dense, patched = models
    short, long = draw_tokens(2, SHORT), draw_tokens(2, LONG)
    assert torch.equal(patched(short).logits, dense(short).logits)
    found, expected = patched(long).logits, dense(long).logits
    # The first tokens see no more blocks than they may select.
    torch.testing.assert_close(found[:, :32], expected[:, :32], rtol=0, atol=1e-4)
    assert (found - expected)[:, -32:].abs().max() > 1e-3
    infllm_flex.unpatch_model(patched)
    assert torch.equal(patched(long).logits, expected)


@torch.no_grad()
def test_a_row_padded_on_the_left_has_the_logits_that_it_has_alone(models):
    patched = models[1]
    tokens = draw_tokens(2, LONG)
    mask = torch.ones_like(tokens)
    mask[1, :37] = 0
    padded = patched(tokens, attention_mask=mask).logits
    alone = patched(tokens[1:, 37:]).logits
    torch.testing.assert_close(padded[1:, 37:], alone, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
def test_tokens_generated_over_a_cache_are_those_of_whole_forwards(models, cache):
    patched = models[1]
    tokens = draw_tokens(1, LONG)
    kwargs = {} if cache is None else {"cache_implementation": cache}
    found = patched.generate(
        tokens, max_new_tokens=4, do_sample=False, disable_compile=True, **kwargs
    )
    for _ in range(4):
        following = patched(tokens, use_cache=False).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, following], 1)
    assert torch.equal(found, tokens)


def test_gradients_flow_through_a_checkpointed_patched_model(models):
    patched = models[1].train()
    tokens = draw_tokens(1, LONG)
    patched(tokens, labels=tokens).loss.backward()
    expected = {name: x.grad.clone() for name, x in patched.named_parameters()}
    patched.zero_grad()
    newer = getattr(patched, "activation_checkpointing_enable", None)
    (newer or patched.gradient_checkpointing_enable)({"use_reentrant": False})
    patched(tokens, labels=tokens).loss.backward()
    assert all(torch.equal(x.grad, expected[name]) for name, x in patched.named_parameters())
    assert all(x.abs().max() > 0 for x in expected.values())


@pytest.mark.slow
@torch.no_grad()
def test_a_patched_model_compiles_to_one_graph(models):
    patched = models[1]
    tokens = draw_tokens(1, LONG)
    expected = patched(tokens, use_cache=False).logits
    graph = torch.compile(patched, fullgraph=True)
    found = graph(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
