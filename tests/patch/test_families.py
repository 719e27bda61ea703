"""Patching changes outputs of each model family at sparse length, and not below."""

import pytest
import torch
from transformers import CLIPVisionConfig, GptOssConfig, LlavaConfig, LlavaForConditionalGeneration

import infllm_flex as ifx
from tests.patch.masked_sdpa import masked_sdpa
from tests.patch.models import (
    CONFIGS,
    EVERYTHING,
    FULL_ATTENTION,
    LONG,
    SETTINGS,
    SHORT,
    VARIANTS,
    build,
    enable_checkpointing,
    equal,
    gemma2,
    logits,
    loss_and_gradients,
)


@pytest.mark.parametrize(("family", "implementation"), VARIANTS)
def test_below_dense_len_every_bit_is_that_of_the_unpatched_model(family, implementation):
    model = build(family, attn_implementation=implementation)
    plain, plain_training = logits(model, SHORT), loss_and_gradients(model, SHORT)
    ifx.patch_model(model, SETTINGS)
    assert torch.equal(logits(model, SHORT), plain)
    assert equal(loss_and_gradients(model, SHORT), plain_training)


@pytest.mark.parametrize(("family", "implementation"), VARIANTS)
def test_below_dense_len_padding_and_generation_keep_working(family, implementation):
    model = build(family, attn_implementation=implementation)
    ids = torch.arange(3, 43).view(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    plain = model.generate(ids, **options)
    ifx.patch_model(model, SETTINGS)
    patched = model.generate(ids, **options)
    assert torch.equal(patched.sequences, plain.sequences)
    assert equal(list(patched.logits), list(plain.logits))


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_with_every_block_selected_sparse_equals_dense(family):
    model = build(family)
    plain, plain_training = logits(model, LONG), loss_and_gradients(model, LONG)
    ifx.patch_model(model, EVERYTHING)
    assert_close([logits(model, LONG)], [plain])
    assert_close(loss_and_gradients(model, LONG), plain_training)


@pytest.mark.parametrize("family", CONFIGS)
def test_at_length_the_model_attends_to_the_selected_blocks(family, monkeypatch):
    model = build(family)
    plain = logits(model, LONG)
    ifx.patch_model(model, SETTINGS)
    ours, ours_training = logits(model, LONG), loss_and_gradients(model, LONG)
    monkeypatch.setattr("infllm_flex.patch.huggingface.attention.infllm_attention", masked_sdpa)
    assert_close([ours], [logits(model, LONG)])
    assert_close(ours_training, loss_and_gradients(model, LONG))
    assert (ours - plain).abs().max() > 1e-2, "a budget of 3 in 8 blocks must change the output"


def test_engines_agree():
    model = ifx.patch_model(build(), SETTINGS)
    fused = logits(model, LONG)
    ifx.patch_model(model, SETTINGS, engine="flex")
    assert_close([logits(model, LONG)], [fused])


def test_gradient_checkpointing_gives_the_same_gradients():
    model = ifx.patch_model(build(), SETTINGS)
    plain = loss_and_gradients(model, LONG)
    enable_checkpointing(model)
    assert_close(loss_and_gradients(model, LONG), plain)


def test_sliding_window_layers_stay_as_they_were():
    model = build("gemma2")
    plain = logits(model, LONG)
    ifx.patch_model(model, EVERYTHING)
    rows = ifx.describe(model)
    assert [row.sparse for row in rows] == [False, True]
    assert rows[0].status == "sliding window 32: left as it was"
    # All blocks are selected, so only a broken sliding window could cause a difference.
    assert_close([logits(model, LONG)], [plain])


def test_a_window_on_some_layers_leaves_those():
    config = CONFIGS["qwen2"]()
    changes = {"sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"]}
    model = build(type(config)(**{**config.to_dict(), "use_sliding_window": True, **changes}))
    ifx.patch_model(model, SETTINGS)
    assert [row.sparse for row in ifx.describe(model)] == [True, False]


def test_a_window_on_every_layer_leaves_none_to_patch():
    config = CONFIGS["mistral"]()
    config.sliding_window = 32
    with pytest.raises(ifx.UnsupportedModelError, match="2 x sliding window 32"):
        ifx.patch_model(build(config), SETTINGS)


def test_only_the_language_model_of_a_vision_model_is_patched():
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(text_config=CONFIGS["llama"](), vision_config=vision)
    model = LlavaForConditionalGeneration(config)
    configs = (config, config.text_config, config.vision_config)
    before = [c._attn_implementation for c in configs]
    ifx.patch_model(model, SETTINGS)
    assert [c._attn_implementation for c in configs] == before
    assert model.model.language_model.config._attn_implementation == "infllm_flex"
    assert ifx.describe(model)[0].status == "not causal: left as it was"
    ifx.unpatch_model(model)
    assert [c._attn_implementation for c in configs] == before


def test_soft_capped_logits_are_refused_when_patching():
    model = build(gemma2(attn_logit_softcapping=50.0))
    with pytest.raises(
        ifx.UnsupportedModelError, match=r"1 x sliding window 32, 1 x logits soft-capped at 50"
    ):
        ifx.patch_model(model, SETTINGS)


def assert_close(ours, theirs):
    # float32 through two layers, whose norms amplify rounding; a wrong block is off by over 1e-2.
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=2e-5)


def test_learned_sinks_are_refused_when_patching():
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=32,
        layer_types=["full_attention", "sliding_attention"],
    )
    model = build(config, attn_implementation="eager")
    reasons = [row.status for row in ifx.describe(model)]
    assert reasons == [
        "learned attention sinks: left as it was",
        "sliding window 32: left as it was",
    ]
    with pytest.raises(ifx.UnsupportedModelError, match="1 x learned attention sinks"):
        ifx.patch_model(model, SETTINGS)
