"""A forward set on an attention layer's instance reaches our function, or is refused."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

import infllm_flex as ifx
from tests.patch.models import LONG, SETTINGS, SHORT, build, logits


def own(self, hidden_states, position_embeddings=None, **kwargs):
    """Handwritten attention that no registry knows."""
    projections = (self.q_proj, self.k_proj, self.v_proj)
    q, k, v = (p(hidden_states).unflatten(-1, (-1, 16)).transpose(1, 2) for p in projections)
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


def attentions(model):
    return [layer.self_attn for layer in model.model.layers]


def set_own(model):
    for attention in attentions(model):
        attention.forward = types.MethodType(own, attention)
    return model


def test_one_that_attends_by_itself_is_refused_when_patching():
    model = set_own(build())
    with pytest.raises(
        ifx.UnsupportedModelError,
        match=r"2 x a forward set on the instance, which calls neither .*; remove it before",
    ):
        ifx.patch_model(model, SETTINGS)
    with pytest.raises(ifx.UnsupportedModelError, match="set on the instance"):
        ifx.patch_model(model, SETTINGS, attention_modules="model.layers.1.self_attn")


def test_one_layer_with_its_own_is_left():
    model = build()
    attentions(model)[0].forward = functools.partial(own, attentions(model)[0])
    ifx.patch_model(model, SETTINGS)
    assert [row.sparse for row in ifx.describe(model)] == [False, True]


def test_set_after_patching_it_is_refused_at_the_next_forward():
    model = set_own(ifx.patch_model(build(), SETTINGS))
    with pytest.raises(ifx.UnsupportedModelError, match=r"LlamaAttention was patched .* unpatch"):
        logits(model, SHORT, use_cache=False)
    ifx.unpatch_model(model)
    logits(model, LONG, use_cache=False)


def wrapped(attention, inner):
    """A common wrapper: its closure holds the function that it calls."""

    def forward(*args, **kwargs):
        return inner(*args, **kwargs)

    return forward


def hooked(attention, inner):
    """accelerate's wrapper."""

    def new_forward(module, *args, **kwargs):
        return module._old_forward(*args, **kwargs)

    attention._old_forward = inner
    return functools.update_wrapper(functools.partial(new_forward, attention), inner)


class Timed:
    def __init__(self, attention, inner):
        self.inner = inner

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


WRAPPERS = {
    "a closure": wrapped,
    "accelerate's": hooked,
    "an object": Timed,
    "bound again": lambda a, inner: types.MethodType(LlamaAttention.forward, a),
    "by name": lambda a, inner: types.MethodType(
        lambda self, *args, **kwargs: LlamaAttention.forward(self, *args, **kwargs), a
    ),
    "compiled": lambda a, inner: torch.compile(inner, backend="aot_eager"),
    "twice": lambda a, inner: functools.partial(wrapped(a, hooked(a, inner))),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_one_that_ends_in_that_of_the_class_is_served(wrap, before):
    torch.compiler.reset()
    model = build()
    if not before:
        ifx.patch_model(model, SETTINGS)
    for attention in attentions(model):
        attention.forward = wrap(attention, attention.forward)
    if before:
        ifx.patch_model(model, SETTINGS)
    sparse = logits(ifx.patch_model(build(), SETTINGS), LONG)
    torch.testing.assert_close(logits(model, LONG), sparse, rtol=1e-3, atol=2e-5)
    assert all(row.sparse for row in ifx.describe(model))
    ifx.unpatch_model(model)
    torch.testing.assert_close(logits(model, LONG), logits(build(), LONG), rtol=1e-3, atol=2e-5)
    assert not any(attention._forward_hooks for attention in attentions(model))
    torch.compiler.reset()


def test_accelerate_itself():
    hooks = pytest.importorskip("accelerate.hooks")
    model = build()
    hooks.add_hook_to_module(model, hooks.ModelHook(), append=True)
    for attention in attentions(model):
        hooks.add_hook_to_module(attention, hooks.AlignDevicesHook(execution_device="cpu"))
    ifx.patch_model(model, SETTINGS)
    assert torch.equal(logits(model, LONG), logits(ifx.patch_model(build(), SETTINGS), LONG))


def test_what_only_running_it_tells_is_told_by_the_first_long_forward():
    """A wrapper that holds the forward of the class, and does not call it."""
    model = build()
    for attention in attentions(model):
        inner = attention.forward

        def forward(*args, attention=attention, inner=inner, use_inner=False, **kwargs):
            return inner(*args, **kwargs) if use_inner else own(attention, *args, **kwargs)

        attention.forward = forward
    ifx.patch_model(model, SETTINGS)
    short = logits(model, SHORT, use_cache=False)
    torch.testing.assert_close(short, logits(build(), SHORT), rtol=1e-3, atol=2e-5)
    with pytest.raises(
        ifx.UnsupportedModelError, match="LlamaAttention attended to 128 tokens without"
    ):
        logits(model, LONG, use_cache=False)
    with ifx.dense(model):
        logits(model, LONG, use_cache=False)
