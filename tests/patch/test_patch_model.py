"""patch_model takes settings in every form and is idempotent; unpatch_model leaves no trace."""

import copy
import dataclasses
import json
import logging
import pickle
import types

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

import infllm_flex as ifx
from tests.patch.models import LONG, SETTINGS, SHORT, build, logits

CONFIG = ifx.InfLLMConfig.from_dict(SETTINGS)


def layer_config(model):
    return model.model.layers[0].self_attn.infllm_layer.config


def test_patches_in_place_and_returns_the_model():
    model = build()
    assert ifx.patch_model(model) is model
    assert ifx.unpatch_model(model) is model


def test_settings_come_as_config_mapping_path_or_text(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("attention:\n" + "".join(f"  {k}: {v}\n" for k, v in SETTINGS.items()))
    for settings in (CONFIG, SETTINGS, path, str(path)):
        assert layer_config(ifx.patch_model(build(), settings)) == CONFIG


def test_without_settings_the_models_own_are_used_else_those_of_the_rule():
    model = build()
    every_key = {"kernel_size": 1, "kernel_stride": 1, "pool_queries": True, "dense_len": 32768}
    has_float8 = model.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
    by_rule = ifx.InfLLMConfig(**every_key, score_dtype="float8" if has_float8 else "same")
    assert layer_config(ifx.patch_model(model)) == by_rule
    assert layer_config(ifx.patch_model(model, topk=7)) == dataclasses.replace(by_rule, topk=7)
    exact = ifx.InfLLMConfig(lse="exact", dense_len=32768)
    assert layer_config(ifx.patch_model(model, lse="exact")) == exact
    model.config.sparse_config = SETTINGS
    assert layer_config(ifx.patch_model(model)) == CONFIG
    assert layer_config(ifx.patch_model(model, topk=7)).topk == 7


@pytest.mark.parametrize(("head_dim", "windows"), [(128, (1, 1)), (256, (8, 4))])
def test_wide_heads_score_means_of_few_keys_each(head_dim, windows):
    """A model with head dim 256 lost half of its answers to pooled queries."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=head_dim,
    )  # fmt: skip
    model = ifx.patch_model(build(config), topk=7)
    found = layer_config(model)
    assert (found.kernel_size, found.kernel_stride, found.topk) == (*windows, 7)
    assert found.pool_queries == (head_dim == 128)
    assert found.score_dims == (32 if head_dim == 128 else 0)
    assert ("head dim above 128" in ifx.describe(model)[0].origin) == (head_dim == 256)
    exact = ifx.InfLLMConfig(lse="exact", dense_len=32768 if head_dim == 128 else 262144)
    assert layer_config(ifx.patch_model(build(config), lse="exact")) == exact


@pytest.mark.parametrize(
    ("overrides", "dtype", "dims"),
    [
        ({"score_dtype": "float8"}, "float8", 32),
        ({"score_dtype": "same", "score_dims": 0}, "same", 0),
        ({"pool_queries": True, "kernel_size": 1}, None, 32),  # the rule's own values
    ],
)
def test_overrides_of_the_arithmetic_keep_the_rules_scoring(overrides, dtype, dims):
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    by_rule = layer_config(ifx.patch_model(build(config)))
    found = layer_config(ifx.patch_model(build(config), **overrides))
    assert found.pool_queries
    assert (found.kernel_size, found.score_dims) == (1, dims)
    assert found.score_dtype == (dtype or by_rule.score_dtype)


def test_overrides_go_on_top():
    config = layer_config(ifx.patch_model(build(), SETTINGS, topk=5, dense_len=-1))
    assert (config.topk, config.dense_len, config.block_size) == (5, -1, 16)


def test_patching_twice_changes_settings_and_nothing_else():
    model = ifx.patch_model(build(), SETTINGS)
    once = logits(model, LONG)
    assert torch.equal(logits(ifx.patch_model(model, SETTINGS), LONG), once)
    ifx.patch_model(model, SETTINGS, topk=3)
    assert not torch.equal(logits(model, LONG), once)
    ifx.patch_model(model, SETTINGS)
    assert torch.equal(logits(model, LONG), once)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_unpatching_leaves_no_trace(family):
    model = build(family)
    plain = logits(model, LONG)
    before = traces(model)
    ifx.patch_model(model, SETTINGS)
    assert traces(model) != before
    ifx.unpatch_model(model)
    assert traces(model) == before
    assert torch.equal(logits(model, LONG), plain)


def traces(model):
    """Classes, attribute names and hooks of every module, and the whole config."""
    modules = [
        (name, type(module), sorted(vars(module)), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    return modules, dict(vars(model.config)), model.config._attn_implementation


def test_the_user_may_change_the_implementation_in_between():
    model = ifx.patch_model(build(), SETTINGS)
    model.set_attn_implementation("eager")
    assert not any(row.sparse for row in ifx.describe(model))
    ifx.unpatch_model(model)
    assert model.config._attn_implementation == "eager"


def test_two_models_keep_their_own_settings():
    one, other, unpatched = build(), build(), build()
    plain = logits(unpatched, LONG)
    ifx.patch_model(one, SETTINGS)
    alone = logits(one, LONG)
    ifx.patch_model(other, SETTINGS, topk=3)
    assert torch.equal(logits(one, LONG), alone)
    assert not torch.equal(logits(other, LONG), alone)
    assert torch.equal(logits(unpatched, LONG), plain)
    ifx.unpatch_model(other)
    assert torch.equal(logits(other, LONG), plain)
    assert torch.equal(logits(one, LONG), alone)


def test_a_deep_copy_is_patched_and_independent():
    model = ifx.patch_model(build(), SETTINGS)
    sparse = logits(model, LONG)
    twin = copy.deepcopy(model)
    ifx.unpatch_model(model)
    assert torch.equal(logits(twin, LONG), sparse)
    ifx.unpatch_model(twin)
    assert torch.equal(logits(twin, LONG), logits(model, LONG))


def test_a_pickled_model_is_patched():
    model = ifx.patch_model(build(), SETTINGS)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin, LONG), logits(model, LONG))


def test_checkpoints_do_not_know_of_patching(tmp_path):
    model = build()
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "plain")
    ifx.patch_model(model, SETTINGS)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path / "patched")
    plain, patched = (
        json.loads((tmp_path / which / "config.json").read_text()) for which in ("plain", "patched")
    )
    assert plain == patched


def test_a_model_inside_another_module_is_found():
    wrapper = nn.ModuleDict({"policy": build(), "value": nn.Linear(4, 1)})
    ifx.patch_model(wrapper, SETTINGS)
    assert [row.name for row in ifx.describe(wrapper)] == [
        f"policy.model.layers.{layer}.self_attn" for layer in range(2)
    ]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dense_len"),
    [(4, 2, 8, 32768), (4, 1, 8, 32768), (4, 4, 8, 131072), (4, 2, 136, 262144)],
)
@pytest.mark.parametrize("overrides", [{}, {"topk": 80}, {"kernel_size": 32}])
def test_models_without_settings_are_sparse_where_it_pays(
    heads, kv_heads, head_dim, dense_len, overrides
):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
    )  # fmt: skip
    model = build(config)
    [row, *_] = ifx.describe(ifx.patch_model(model, **overrides))
    assert row.config.dense_len == dense_len
    [row, *_] = ifx.describe(ifx.patch_model(model, dense_len=100, **overrides))
    assert row.config.dense_len == 100


def test_what_is_sparse_is_logged_and_from_where_it_pays(caplog):
    with caplog.at_level(logging.INFO, logger="infllm_flex"):
        ifx.patch_model(build("gemma2"), SETTINGS)
    assert [record.getMessage() for record in caplog.records] == [
        "Gemma2ForCausalLM: 1 of 2 attention layers sparse from 96 tokens on "
        "(settings: given to patch_model); "
        "1 left as they were: sliding window 32",
        "on a CPU sparse attention is measured to be faster from 16384 tokens on",
    ]


def test_nothing_is_said_of_a_length_where_sparse_attention_pays(caplog):
    with caplog.at_level(logging.INFO, logger="infllm_flex"):
        ifx.patch_model(build(), SETTINGS, dense_len=16384)
    assert [record.getMessage() for record in caplog.records] == [
        "LlamaForCausalLM: 2 of 2 attention layers sparse from 16384 tokens on "
        "(settings: given to patch_model)"
    ]


def test_a_model_can_be_built_with_the_implementation():
    config = build().config
    config.sparse_config = SETTINGS
    model = build(config, attn_implementation="infllm_flex")
    patched = ifx.patch_model(build(), SETTINGS)
    assert torch.equal(logits(model, SHORT), logits(patched, SHORT))
    assert torch.equal(logits(model, LONG), logits(patched, LONG))
    ifx.unpatch_model(model)
    assert model.config._attn_implementation == "sdpa"


def test_how_to_save_what_came_from_a_gguf_file_is_logged(caplog):
    model = build()
    model.config.quantization_config = types.SimpleNamespace(quant_method="gguf")
    with caplog.at_level(logging.INFO, logger="infllm_flex"):
        ifx.patch_model(model, SETTINGS)
    assert any("model.hf_quantizer = None" in record.getMessage() for record in caplog.records)
