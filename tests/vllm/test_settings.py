"""Which models are served sparsely, by what settings. Needs no vLLM."""

from types import SimpleNamespace

import pytest

from infllm_flex import InfLLMConfig
from infllm_flex.vllm.announcement import describe_served
from infllm_flex.vllm.settings import read_settings

OWN = {"block_size": 32, "window_size": 32, "topk": 3, "dense_len": 100}
PLAIN, TRAINED = SimpleNamespace(), SimpleNamespace(sparse_config=OWN)


@pytest.mark.parametrize("additional", [{}, {"another_plugin": {"x": 1}}, None, object()])
def test_a_model_without_settings_asks_for_nothing(additional):
    assert read_settings(additional, PLAIN) is None
    assert read_settings(additional, SimpleNamespace(sparse_config=None)) is None


def test_a_models_own_settings_are_enough():
    config, origin = read_settings({}, TRAINED)
    assert config == InfLLMConfig(**OWN)
    assert "sparse_config" in origin


def test_given_settings_take_precedence_one_by_one():
    config, origin = read_settings({"infllm": {"dense_len": 7}}, TRAINED)
    assert config == InfLLMConfig(**{**OWN, "dense_len": 7})
    assert "additional_config" in origin


def test_given_settings_are_enough():
    assert read_settings({"infllm": {}}, PLAIN).config == InfLLMConfig()
    assert read_settings({"infllm": OWN}, PLAIN).config == InfLLMConfig(**OWN)


@pytest.mark.parametrize("declined", [False, None])
def test_a_user_may_decline_a_models_settings(declined):
    assert read_settings({"infllm": declined}, TRAINED) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"topc": 3}, "did you mean topk"),
        ({"topk": 0}, "topk must be between"),
        (True, "must be a mapping of settings or false, got True"),
        ("fused", "must be a mapping of settings or false, got 'fused'"),
    ],
)
def test_bad_settings_are_an_error_of_one_line(given, message):
    with pytest.raises(ValueError, match=message) as error:
        read_settings({"infllm": given}, PLAIN)
    assert "\n" not in str(error.value)


def test_the_log_says_what_is_served_and_what_it_costs():
    first, second = describe_served(read_settings({"infllm": {}}, PLAIN), page_size=128)
    for part in ("additional_config", "from 8191 on", "96 blocks of 64", "3.9% to pages of 128"):
        assert part in first
    assert "6144 to 8190" in second  # dense here, sparse in training


@pytest.mark.parametrize("changes", [{"dense_by": "position"}, {"dense_len": 6145}], ids=str)
def test_the_log_has_one_line_where_training_went_by_the_same_rule(changes):
    (line,) = describe_served(read_settings({"infllm": changes}, PLAIN), page_size=None)
    assert "pages" not in line
