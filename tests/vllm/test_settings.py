"""Which models are served sparsely, by what settings. Needs no vLLM."""

import functools
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, Gemma4TextConfig, LlamaConfig

from infllm_flex import InfLLMConfig, describe, patch_model
from infllm_flex.vllm.announcement import describe_served
from infllm_flex.vllm.rotation import is_known_to_suit
from infllm_flex.vllm.settings import read_settings
from infllm_flex.vllm.vllm_config import move_sparse_config, read_served

EVERY_KEY = {"kernel_size": 1, "kernel_stride": 1, "pool_queries": True}
OWN = {"block_size": 32, "window_size": 32, "topk": 3, "dense_len": 100}
PLAIN, TRAINED = SimpleNamespace(), SimpleNamespace(sparse_config=OWN)


def read(additional, model_config, has_float8=False, suits_score_dims=lambda num: False):
    return read_settings(additional, model_config, lambda: has_float8, suits_score_dims)


@pytest.mark.parametrize("additional", [{}, {"another_plugin": {"x": 1}}, None, object()])
def test_a_model_without_settings_asks_for_nothing(additional):
    assert read(additional, PLAIN) is None
    assert read(additional, SimpleNamespace(sparse_config=None)) is None


def test_a_models_own_settings_are_enough():
    config, origin = read({}, TRAINED)
    assert config == InfLLMConfig(**OWN)
    assert "sparse_config" in origin


def test_given_settings_take_precedence_one_by_one():
    config, origin = read({"infllm": {"dense_len": 7}}, TRAINED)
    assert config == InfLLMConfig(**{**OWN, "dense_len": 7})
    assert "additional_config" in origin


@pytest.mark.parametrize(
    "given",
    [{}, OWN, {"topk": 80}, {"kernel_size": 8, "kernel_stride": 4}, {"lse": "exact", "topk": 80}],
    ids=str,
)
@pytest.mark.parametrize(
    ("model_type", "head_dim", "kv_heads"),
    [
        ("llama", 64, 1),
        ("llama", 256, 1),
        ("llama", 64, 2),
        ("qwen2", 64, 1),  # its config does not name the head dim
        ("mixtral", 256, 1),
    ],
)
def test_given_settings_mean_what_they_mean_to_patch_model(given, model_type, head_dim, kv_heads):
    model_config = AutoConfig.for_model(
        model_type,
        vocab_size=8,
        hidden_size=2 * head_dim,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
    )
    model = patch_model(AutoModelForCausalLM.from_config(model_config), **given)
    [patched, *_] = describe(model)
    suits = functools.partial(is_known_to_suit, model_config)
    served = read({"infllm": given}, model_config, suits_score_dims=suits)
    assert served.config == patched.config


@pytest.mark.parametrize(("has_float8", "score_dtype"), [(False, "same"), (True, "float8")])
def test_a_user_may_ask_for_the_settings_that_patch_model_takes(has_float8, score_dtype):
    config, origin = read({"infllm": True}, PLAIN, has_float8)
    assert config == InfLLMConfig(**EVERY_KEY, score_dtype=score_dtype, dense_len=32768)
    assert "without a sparse_config" in origin
    assert read({"infllm": True}, TRAINED) == read({}, TRAINED)


@pytest.mark.parametrize(("most", "dims"), [(64, 32), (16, 0)])
def test_a_part_of_the_dims_is_scored_where_the_model_suits_it(most, dims):
    model_config = LlamaConfig(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    found = read({"infllm": True}, model_config, suits_score_dims=lambda num: num <= most)
    assert found.config.score_dims == dims
    assert ("a part of the head dims" in found.origin) == (dims > 0)


@pytest.mark.parametrize("declined", [False, None])
def test_a_user_may_decline_a_models_settings(declined):
    assert read({"infllm": declined}, TRAINED) is None


@pytest.mark.parametrize(("head_dim", "size"), [(64, 1), (256, 8)])
def test_where_layers_differ_the_full_ones_decide(head_dim, size):
    layers = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 32}
    model_config = Gemma4TextConfig(**layers, num_hidden_layers=2, global_head_dim=head_dim)
    assert read({"infllm": True}, model_config).config.kernel_size == size


def test_a_sparse_config_counts_outside_and_inside_of_a_multimodal_models_text_config():
    # vLLM gives the text model the inner config alone.
    for outer, inner in ((TRAINED, SimpleNamespace()), (PLAIN, TRAINED)):
        model_config = SimpleNamespace(hf_config=outer, hf_text_config=inner)
        whole = SimpleNamespace(model_config=model_config, additional_config={})
        move_sparse_config(whole)
        text_model = SimpleNamespace(hf_config=inner, hf_text_config=inner)
        for config in (model_config, text_model):
            found = read_served(SimpleNamespace(model_config=config, additional_config={}))
            assert found.config == InfLLMConfig(**OWN)


def test_a_configuration_without_a_model_has_nothing_to_move():
    move_sparse_config(SimpleNamespace(model_config=None))


@pytest.mark.parametrize("name", ["InfLLM", "infllm_flex", "infllm-v2", "INFLLM", "inflm"])
@pytest.mark.parametrize("model_config", [PLAIN, TRAINED])
def test_a_mistyped_key_is_refused(name, model_config):
    with pytest.raises(ValueError, match=f"{name}'.* go under 'infllm'") as error:
        read({name: {"topk": 3}}, model_config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("own", [{"topc": 3}, {"topk": "3"}, True, []])
def test_bad_settings_of_a_model_are_named_and_may_be_declined(own):
    model_config = SimpleNamespace(sparse_config=own)
    with pytest.raises(ValueError, match=r"sparse_config: .*\"infllm\": false") as error:
        read({}, model_config)
    assert "\n" not in str(error.value)
    assert read({"infllm": False}, model_config) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"topc": 3}, "additional_config.*did you mean topk"),
        ({"topk": 0}, "topk must be between"),
        ({"engine": "flex"}, "additional_config.*engine must be auto or left out, got 'flex'"),
        (1, "must be a mapping of settings, true or false, got 1"),
        ("fused", "must be a mapping of settings, true or false, got 'fused'"),
    ],
)
def test_bad_settings_are_an_error_of_one_line(given, message):
    with pytest.raises(ValueError, match=message) as error:
        read({"infllm": given}, PLAIN)
    assert "\n" not in str(error.value)


def test_the_log_says_what_is_served_and_what_it_costs():
    windows = {"kernel_size": 32, "kernel_stride": 16}
    first, second = describe_served(read({"infllm": windows}, PLAIN), page_size=128)
    for part in ("additional_config", "from 32767 on", "96 blocks of 64", "3.9% to pages of 128"):
        assert part in first
    assert "6144 to 32766" in second  # dense here, sparse in training


def test_the_log_says_that_every_key_is_scored():
    line, _ = describe_served(read({"infllm": True}, PLAIN), page_size=64)
    assert "Every key is scored, and nothing is kept" in line
    assert "pages" not in line


@pytest.mark.parametrize("changes", [{"dense_by": "position"}, {"dense_len": 6145}], ids=str)
def test_the_log_has_one_line_where_training_went_by_the_same_rule(changes):
    (line,) = describe_served(read({"infllm": changes}, PLAIN), page_size=None)
    assert "pages" not in line
