"""Patching changes the modules of one model, not a config that other models share."""

import copy
import pickle

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    LlamaModel,
)

import infllm_flex as ifx
from tests.patch.models import CONFIGS, EVERYTHING, LONG, SETTINGS, SHORT, build, logits, tokens

HOW = ["sdpa", "eager"]


def pair(how="sdpa"):
    """Two models of one config object, with the same weights."""
    one = build(attn_implementation=how)
    other = LlamaForCausalLM(one.config).eval()
    other.load_state_dict(one.state_dict())
    assert other.config is one.config
    return one, other


def is_patched(model):
    return any(row.patched_through for row in ifx.describe(model))


@pytest.mark.parametrize("how", HOW)
def test_another_model_of_the_config_stays_dense(how):
    one, other = pair(how)
    plain = logits(other, LONG)
    ifx.patch_model(one, SETTINGS)
    assert not torch.equal(logits(one, LONG), plain)
    assert torch.equal(logits(other, LONG), plain)
    assert not is_patched(other)
    assert one.config._attn_implementation == how
    later = LlamaForCausalLM(one.config).eval()
    later.load_state_dict(one.state_dict())
    assert torch.equal(logits(later, LONG), plain)
    made = AutoModelForCausalLM.from_config(one.config).eval()
    made.load_state_dict(one.state_dict())
    assert torch.equal(logits(made, LONG), plain)
    assert not is_patched(later)
    assert not is_patched(made)


def test_each_keeps_its_own_settings_and_end():
    one, other = pair()
    plain = logits(one, LONG)
    ifx.patch_model(one, SETTINGS)
    ifx.patch_model(other, SETTINGS, topk=3)
    ours, theirs = logits(one, LONG), logits(other, LONG)
    assert not torch.equal(ours, theirs)
    ifx.unpatch_model(one)
    assert torch.equal(logits(one, LONG), plain)
    assert torch.equal(logits(other, LONG), theirs)
    with pytest.raises(ValueError, match="not patched"):
        ifx.unpatch_model(one)
    ifx.patch_model(one, SETTINGS)
    ifx.unpatch_model(other)
    assert torch.equal(logits(one, LONG), ours)
    assert torch.equal(logits(other, LONG), plain)


def test_a_padded_batch_of_the_other_model():
    one, other = pair()
    mask = torch.ones(2, LONG, dtype=torch.int64)
    mask[0, :20] = 0
    plain = logits(other, LONG, attention_mask=mask)
    ifx.patch_model(one, SETTINGS)
    assert torch.equal(logits(other, LONG, attention_mask=mask), plain)


def test_what_is_set_on_the_config_reaches_the_patched_model():
    one, _ = pair()
    config = one.config
    ifx.patch_model(one, SETTINGS)
    assert one.config is config
    one.config.use_cache = False
    assert one(tokens(8)).past_key_values is None
    config.use_cache = True
    assert one(tokens(8)).past_key_values is not None
    assert one.model.config == config
    ifx.unpatch_model(one)
    assert one.model.config is config
    assert one.model.layers[0].self_attn.config is config


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_clone_is_patched_and_its_config_is_its_own(clone):
    one, other = pair()
    plain = logits(one, LONG)
    ifx.patch_model(one, SETTINGS)
    twin = clone(one)
    sparse = logits(one, LONG)
    twin.config.use_cache = False
    assert twin(tokens(8)).past_key_values is None
    assert one(tokens(8)).past_key_values is not None
    assert torch.equal(logits(twin, LONG), sparse)
    ifx.unpatch_model(twin)
    assert torch.equal(logits(twin, LONG), plain)
    assert twin.model.config is twin.config
    assert torch.equal(logits(one, LONG), sparse)
    assert torch.equal(logits(other, LONG), plain)


def test_saved_and_loaded_it_is_dense(tmp_path):
    one, _ = pair()
    plain = logits(one, LONG)
    ifx.patch_model(one, SETTINGS).save_pretrained(tmp_path)
    one.model.config.save_pretrained(tmp_path / "body")
    assert "infllm" not in (tmp_path / "config.json").read_text()
    assert "infllm" not in (tmp_path / "body" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, LONG), plain)
    assert not is_patched(loaded)


class TestAnotherImplementation:
    """`set_attn_implementation` of a patched model counts; that of another model does not."""

    @pytest.mark.parametrize("how", HOW)
    def test_set_on_a_patched_model_it_is_taken(self, how):
        one, _ = pair()
        ifx.patch_model(one, SETTINGS)
        one.set_attn_implementation(how)
        assert not any(row.sparse for row in ifx.describe(one))
        plain = build(attn_implementation=how)
        assert torch.equal(logits(one, LONG), logits(plain, LONG))
        ifx.patch_model(one, SETTINGS)
        assert all(row.sparse for row in ifx.describe(one))
        ifx.unpatch_model(one)
        assert one.config._attn_implementation == how

    def test_of_another_model_of_the_config_changes_only_short_sequences(self):
        one, _ = pair()
        ifx.patch_model(one, SETTINGS)
        sparse = logits(one, LONG)
        AutoModelForCausalLM.from_config(one.config, attn_implementation="eager")
        assert torch.equal(logits(one, LONG), sparse)
        eager = build(attn_implementation="eager")
        assert torch.equal(logits(one, SHORT), logits(eager, SHORT))
        assert all(row.sparse for row in ifx.describe(one))


class TestByName:
    """``attn_implementation="infllm_flex"`` in a config holds for all its models."""

    def named(self):
        config = CONFIGS["llama"]()
        config.sparse_config = SETTINGS
        one = build(config, attn_implementation="infllm_flex")
        other = LlamaForCausalLM(one.config).eval()
        other.load_state_dict(one.state_dict())
        return one, other

    def test_undoing_one_leaves_the_other(self):
        one, other = self.named()
        plain, sparse = logits(build(), LONG), logits(other, LONG)
        ifx.unpatch_model(one)
        assert torch.equal(logits(one, LONG), plain)
        assert torch.equal(logits(other, LONG), sparse)
        assert one.config._attn_implementation == "sdpa"
        assert one.model.config is one.config

    def test_patching_one_changes_its_settings_alone(self):
        one, other = self.named()
        sparse = logits(other, LONG)
        ifx.patch_model(one, SETTINGS, topk=3)
        assert torch.equal(logits(other, LONG), sparse)
        assert not torch.equal(logits(one, LONG), sparse)


class TestParts:
    def test_one_layer_alone(self):
        model = build()
        plain = logits(model, LONG)
        ifx.patch_model(model.model.layers[1], SETTINGS)
        assert [row.sparse for row in ifx.describe(model)] == [False, True]
        assert not torch.equal(logits(model, LONG), plain)
        ifx.unpatch_model(model.model.layers[1])
        assert torch.equal(logits(model, LONG), plain)
        assert model.model.layers[1].self_attn.config is model.config

    def test_one_layer_undone_goes_on_taking_the_masks_of_the_model(self):
        mask = torch.ones(2, LONG, dtype=torch.int64)
        mask[0, :20] = 0
        model, plain = build(), build()
        ifx.patch_model(model, EVERYTHING)
        ifx.unpatch_model(model.model.layers[1])
        assert [row.sparse for row in ifx.describe(model)] == [True, False]
        for kwargs in ({}, {"attention_mask": mask}):
            ours, theirs = logits(model, LONG, **kwargs), logits(plain, LONG, **kwargs)
            real = mask.bool() if kwargs else torch.ones_like(mask).bool()
            torch.testing.assert_close(ours[real], theirs[real], rtol=1e-3, atol=2e-5)
        ifx.unpatch_model(model)
        assert torch.equal(logits(model, LONG), logits(plain, LONG))
        assert model.model.layers[1].self_attn.config is model.config

    def test_a_body_made_of_the_config_of_a_patched_body_is_dense(self):
        model = ifx.patch_model(build(), SETTINGS)
        body = LlamaModel(model.model.config).eval()
        body.load_state_dict(model.model.state_dict())
        plain = build().model
        assert not is_patched(body)
        with torch.no_grad():
            ours, theirs = (m(tokens(LONG)).last_hidden_state for m in (body, plain))
        assert torch.equal(ours, theirs)
        assert not is_patched(body)
        assert model.config._attn_implementation == "sdpa"
        ifx.patch_model(body, SETTINGS)
        assert is_patched(body)
        ifx.unpatch_model(body)
        assert all(row.sparse for row in ifx.describe(model))


def test_compiled_with_another_model_of_the_config():
    torch.compiler.reset()
    one, other = pair()
    plain = logits(other, LONG)
    functions = [torch.compile(m, fullgraph=True, backend="aot_eager") for m in (one, other)]
    for function in functions:
        torch.testing.assert_close(logits(function, LONG), plain)
    ifx.patch_model(one, SETTINGS)
    sparse = logits(one, LONG)
    torch.testing.assert_close(logits(functions[0], LONG), sparse, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(logits(functions[1], LONG), plain)
    ifx.unpatch_model(one)
    torch.testing.assert_close(logits(functions[0], LONG), plain)
    torch.compiler.reset()


def test_padded_text_of_a_model_of_text_and_images():
    """The outer model makes the masks, by a config within its own."""
    text = {
        **CONFIGS["llama"]().to_dict(),
        "head_dim": 16,
        "sliding_window": 32,
        "layer_types": ["full_attention"] * 2,
    }
    for key in ("model_type", "architectures", "rope_parameters", "transformers_version"):
        text.pop(key, None)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ).to_dict() | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    mask = torch.ones(2, LONG, dtype=torch.int64)
    mask[0, :20] = 0
    plain = logits(model, LONG, attention_mask=mask)
    ifx.patch_model(model, EVERYTHING)
    ours = logits(model, LONG, attention_mask=mask)
    assert any(row.sparse for row in ifx.describe(model))
    torch.testing.assert_close(ours[mask.bool()], plain[mask.bool()], rtol=1e-3, atol=2e-5)
    ifx.unpatch_model(model)
    assert torch.equal(logits(model, LONG, attention_mask=mask), plain)
    assert model.model.config is model.config
