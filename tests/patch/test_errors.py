"""Errors about models and calls are one line: what came, and what to do."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BloomConfig, FalconConfig, StaticCache

import infllm_flex as ifx
from tests.patch.models import CACHE, EVERYTHING, LONG, SETTINGS, SHORT, build, logits, tokens


@pytest.fixture
def model():
    return ifx.patch_model(build(), SETTINGS)


@pytest.mark.parametrize("function", [ifx.patch_model, ifx.unpatch_model, ifx.describe])
def test_only_modules_are_models(function):
    with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got str$"):
        function("llama")


def test_settings_of_another_type():
    with pytest.raises(
        TypeError, match=r"config must be an InfLLMConfig, a mapping, a path .* got int"
    ):
        ifx.patch_model(build(), 3)


def test_an_unknown_override_names_the_nearest_setting():
    with pytest.raises(ValueError, match=r"'top_k': 3 \(did you mean topk\?\)"):
        ifx.patch_model(build(), top_k=3)


def test_scoring_before_the_rotary_embedding():
    with pytest.raises(NotImplementedError, match=r"use_nope=True .* set use_nope=False$"):
        ifx.patch_model(build(), use_nope=True)


def test_a_refused_patch_leaves_the_model_alone():
    model = build()
    with pytest.raises(ValueError, match="topk"):
        ifx.patch_model(model, topk=0)
    assert not any(row.patched_through for row in ifx.describe(model))


def test_unpatching_what_was_never_patched():
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM is not patched: "):
        ifx.unpatch_model(build())


def test_a_model_without_attention():
    with pytest.raises(
        ifx.UnsupportedModelError,
        match=r"Linear cannot be patched: found no attention layer .*; tried",
    ):
        ifx.patch_model(nn.Linear(2, 2))


def test_an_encoder():
    encoder = BertModel(BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2))
    with pytest.raises(
        ifx.UnsupportedModelError, match=r"found 2 attention layers, none .*: 2 x not causal"
    ):
        ifx.patch_model(encoder)
    assert encoder.config._attn_implementation == "sdpa"


def test_softmax_written_by_hand_names_the_class_and_the_way_out():
    config = BloomConfig(vocab_size=64, hidden_size=64, n_layer=1, n_head=4)
    with pytest.raises(
        ifx.UnsupportedModelError,
        match=r"BloomForCausalLM .* found no attention layer but BloomAttention, which calls "
        r"softmax; .* call infllm_flex\.infllm_attention in the model's own forward$",
    ):
        ifx.patch_model(build(config))


def test_alibi():
    size = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ifx.UnsupportedModelError, match="1 x ALiBi"):
        ifx.patch_model(build(FalconConfig(**size, alibi=True)))


def test_another_implementation_than_sdpa_or_eager():
    model = build(attn_implementation="flex_attention")
    with pytest.raises(ifx.UnsupportedModelError, match="2 x attn_implementation='flex_attention'"):
        ifx.patch_model(model)


def padded(length):
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, :9] = 0
    return mask


MASK = "an attention mask beyond causal, padded and packed (a 4-D mask, prefixes, blocks)"
UNSERVED = {
    "a mask of one's own": (
        {"attention_mask": torch.ones(2, 1, LONG, LONG).tril().triu(-100).bool()},
        MASK,
    ),
    "sinks": ({"s_aux": torch.zeros(4)}, "learned attention sinks"),
    "soft cap": ({"softcap": 50.0}, "soft-capped logits"),
    "position bias": ({"position_bias": torch.zeros(1)}, "a position bias"),
    "sliding window": ({"sliding_window": 32}, "a sliding window"),
    "weights": ({"output_attentions": True}, "attention weights (output_attentions=True)"),
    "not causal": ({"is_causal": False}, "attention that is not causal"),
}


@pytest.mark.parametrize("kwargs", UNSERVED.values(), ids=UNSERVED)
def test_what_is_not_served_at_length_is_refused(model, kwargs):
    kwargs, came = kwargs
    with pytest.raises(NotImplementedError) as caught:
        logits(model, LONG, **kwargs)
    assert str(caught.value) == (
        f"sparse attention cannot serve {came} yet: got 128 keys; stay below dense_len = 96, "
        "or run inside infllm_flex.dense(model)"
    )


STEP_MASKS = {
    "a bias by distance": torch.arange(-LONG + 1.0, 1.0).expand(2, 1, 1, LONG) / 8,
    "keys that one head alone sees": torch.ones(2, 4, 1, LONG).index_fill(1, torch.tensor(1), 0),
}


@pytest.mark.parametrize("mask", STEP_MASKS.values(), ids=STEP_MASKS)
def test_a_step_whose_mask_does_more_than_hide_padding_is_refused(model, mask):
    ids = tokens(LONG)
    mask = mask if mask.lt(0).any() else mask.bool()
    with torch.no_grad():
        cache = getattr(model(ids[:, :-1], use_cache=True), CACHE)
        with pytest.raises(RuntimeError, match="and no other attention_mask"):
            model(ids[:, -1:], attention_mask=mask, **{CACHE: cache})


def test_dropout_at_length_is_refused():
    config = build().config
    config.attention_dropout = 0.1
    model = ifx.patch_model(build(config), SETTINGS).train()
    with pytest.raises(NotImplementedError, match=r"attention dropout \(0\.1\)"):
        model(tokens(LONG))


def test_a_static_cache_below_dense_len_keeps_working():
    outputs = []
    for model in (build(), ifx.patch_model(build(), SETTINGS)):
        cache = StaticCache(config=model.config, max_cache_len=40)
        first = model(tokens(20), **{CACHE: cache}).logits
        outputs.append([first, model(tokens(1), **{CACHE: cache}).logits])
    assert all(map(torch.equal, *outputs))


def test_inside_dense_everything_is_served(model):
    plain = build()
    with ifx.dense(model):
        assert torch.equal(
            logits(model, LONG, attention_mask=padded(LONG)),
            logits(plain, LONG, attention_mask=padded(LONG)),
        )


class TestFlagAfterPatching:
    """``is_causal`` may change after patching, as models that embed text do."""

    @pytest.mark.parametrize("length", [SHORT, LONG])
    def test_a_layer_that_is_causal_no_more(self, length):
        model, plain = ifx.patch_model(build("qwen3"), EVERYTHING), build("qwen3")
        for layer in (*model.model.layers, *plain.model.layers):
            layer.self_attn.is_causal = False
        if length == SHORT:
            assert torch.equal(logits(model, length), logits(plain, length))
            return
        with pytest.raises(NotImplementedError, match="cannot serve attention that is not causal"):
            logits(model, length)
        with ifx.dense(model):
            assert torch.equal(logits(model, length), logits(plain, length))

    def test_the_keyword_precedes_the_flag(self):
        model = ifx.patch_model(build(), SETTINGS)
        causal = logits(model, LONG)
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        assert torch.equal(logits(model, LONG, is_causal=True), causal)
