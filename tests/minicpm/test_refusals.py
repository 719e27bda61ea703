"""Settings of MiniCPM's folders that are not supported raise one clear error each."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import infllm_flex as ifx
from tests.minicpm.folders import LONGROPE, SPARSE, config, write


def longrope(**changes):
    return {
        "rope_scaling": {n: v for n, v in {**LONGROPE, **changes}.items() if v is not ...},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, "num_experts is 8: MiniCPM with experts is not supported"),
        ({"dim_model_base": ...}, "dim_model_base must be a number above 0, got None"),
        ({"dim_model_base": 0}, "dim_model_base must be a number above 0, got 0"),
        ({"scale_depth": ...}, "scale_depth must be a number above 0"),
        ({"scale_emb": "12"}, "scale_emb must be a number above 0, got '12'"),
        ({"hidden_size": ...}, "hidden_size must be a number above 0"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads = 5"),
        ({"kv_channels": 16}, "kv_channels must be hidden_size / num_attention_heads = 8, got 16"),
        ({"hidden_act": "fatrelu"}, "hidden_act must be one of .*silu.*, got 'fatrelu'"),
        ({"architectures": ["MiniCPM"]}, "only MiniCPMForCausalLM is supported"),
        (longrope(rope_type="unheard"), "rope_type must be one of .*longrope.*, got 'unheard'"),
        (longrope(rope_type=...), "rope_type must be one of .*, got None"),
        (longrope(type="linear"), "type 'linear' and rope_type 'longrope': leave one of them"),
        (longrope(short_factor=...), r"short_factor must be a list of head_dim / 2 = 4 numbers"),
        (longrope(long_factor=[1.0]), r"long_factor must be a list .* got 1"),
        (
            longrope(original_max_position_embeddings=...),
            "original_max_position_embeddings must be an integer, got None",
        ),
        ({"max_position_embeddings": 16}, "must be at least .* = 32, got 16"),
        (longrope(factor=4.0), r"factor is 4\.0, but .* = 64 / 32 gives 2, .* remove factor"),
        (longrope(attention_factor=2.0), "attention_factor is 2.0, but"),
        ({"quantization_config": {"quant_method": "unheard"}}, "quant_method must be one of"),
        ({"quantization_config": {"bits": 4}}, "quant_method must be one of .*, got None"),
        ({"sparse_config": {**SPARSE, "tpk": 3}}, r"unknown attention setting 'tpk'.*topk"),
        ({"sparse_config": {**SPARSE, "block_size": 0}}, "block_size must be between"),
    ],
)
def test_a_configuration_that_cannot_be_honoured(tmp_path, changes, message):
    write(tmp_path / "m", config())
    settings = config(**changes)
    (tmp_path / "m" / "config.json").write_text(json.dumps(settings))
    for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "m")


def test_factors_that_say_what_the_lengths_say_are_taken(tmp_path):
    changes = longrope(factor=2, attention_factor=(1 + 1 / 5) ** 0.5)
    write(tmp_path / "m", config(**changes))
    assert AutoConfig.from_pretrained(tmp_path / "m").rope_scaling == changes["rope_scaling"]


def rename(folder, names):
    """Rename the weights of a folder; drop those whose new name is None."""
    file = folder / "model.safetensors"
    weights = {re.sub(*names, name): value for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        # Quantised weights, experts and norms of queries are found by the names of tensors.
        ((r"q_proj\.weight", "q_proj.qweight"), r"has no model\..*q_proj\.weight .*q_proj\.qweigh"),
        ((r"mlp\.up_proj", "mlp.experts.0.w3"), r"has the unknown model\..*experts\.0\.w3"),
        ((r"lm_head", "head"), r"has no lm_head\.weight and has the unknown head\.weight"),
    ],
)
def test_weights_of_another_architecture(tmp_path, names, message):
    write(tmp_path / "m", config())
    rename(tmp_path / "m", names)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_leftovers_of_older_versions_are_no_reason(tmp_path):
    weights = write(tmp_path / "m", config(tie_word_embeddings=True))
    extra = {
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file({**weights, **extra}, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])


def test_an_implementation_that_cannot_be_sparse(tmp_path):
    write(tmp_path / "m", config())
    with pytest.raises(ifx.UnsupportedModelError, match="flex_attention"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="flex_attention")
    arguments = {"attn_implementation": "flex_attention", "sparse_config": None}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", **arguments)
    assert model.config._attn_implementation == "flex_attention"


def test_a_change_of_the_configuration_is_checked_as_well(tmp_path):
    write(tmp_path / "m", config())
    settings = copy.deepcopy(AutoConfig.from_pretrained(tmp_path / "m"))
    with pytest.raises(ValueError, match="rope_type must be one of"):
        settings.rope_scaling = {"type": "unheard"}
    assert settings.rope_scaling == LONGROPE
    settings.rope_theta = 500.0  # as servers do
    assert settings.to_dict()["rope_theta"] == settings.rope_parameters["rope_theta"] == 500.0
