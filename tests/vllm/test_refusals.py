"""Unserved cases are refused by name, in one line that says what to do. Needs no vLLM."""

import pytest

from infllm_flex import InfLLMConfig
from infllm_flex.patch.settings import Resolved
from infllm_flex.vllm.refusals import LayerFacts, ServerFacts, check_layer, check_server

SERVER = ServerFacts(
    uses_mla=False,
    has_encoder=False,
    has_other_layers=False,
    full_layers=True,
    cache_dtype="auto",
    model_dtype="bfloat16",
    page_size=64,
    attention_backend=None,
    tensor_parallel=1,
    kv_heads=1,
    context_parallel=1,
    moves_pages=False,
    drafts=None,
    ahead=0,
)
LAYER = LayerFacts(
    alibi=False,
    soft_cap=False,
    sinks=False,
    window=False,
    kind="decoder",
    shares_cache=False,
    others=(),
)


def served(**settings):
    return Resolved(InfLLMConfig(**settings), "the model's sparse_config")


def test_a_plain_server_and_a_plain_layer_are_served():
    check_server(SERVER, served())
    check_layer(LAYER)


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_dtype": "bfloat16"},
        {"page_size": None},
        {"page_size": 16},
        {"page_size": 640},
        {"drafts": "ngram"},
        {"drafts": "ngram_gpu", "ahead": 15},
        {"tensor_parallel": 4, "kv_heads": 8},
        {"tensor_parallel": 8, "kv_heads": 8},
    ],
    ids=str,
)
def test_what_makes_no_difference_is_served(changes):
    check_server(SERVER._replace(**changes), served())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"uses_mla": True}, "MLA"),
        ({"has_encoder": True}, "encoders"),
        ({"has_other_layers": True}, "keep a state instead of keys"),
        ({"full_layers": False}, "models without keys to score"),
        ({"cache_dtype": "fp8_e4m3"}, "a cache in fp8_e4m3"),
        ({"cache_dtype": "float16"}, "a cache in float16"),
        ({"attention_backend": "FLASH_ATTN"}, "attention backend FLASH_ATTN"),
        ({"tensor_parallel": 4, "kv_heads": 2}, "2 key/value heads in 4 processes"),
        ({"context_parallel": 4}, "context parallelism, got 4"),
        ({"moves_pages": True}, "KV connectors"),
        ({"drafts": "eagle3"}, "drafts by eagle3"),
        ({"drafts": "ngram_gpu", "ahead": 16}, "16 draft tokens .* at most 15"),
    ],
)
def test_a_server_that_asks_for_more_is_refused_by_name(changes, name):
    with pytest.raises(ValueError, match=name) as error:
        check_server(SERVER._replace(**changes), served())
    assert_is_advice(error)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"alibi": True}, "ALiBi"),
        ({"soft_cap": True}, "soft cap"),
        ({"sinks": True}, "sinks"),
        ({"window": True}, "sliding window"),
        ({"kind": "encoder_only"}, "encoder_only attention"),
        ({"shares_cache": True}, "none to score"),
        ({"others": ("chunk_lookback",)}, "chunk_lookback"),
    ],
)
def test_a_layer_that_asks_for_more_is_refused_by_name(changes, name):
    with pytest.raises(ValueError, match=name) as error:
        check_layer(LAYER._replace(**changes))
    assert_is_advice(error)


@pytest.mark.parametrize("page", [None, 16, 64, 512])
def test_pooled_queries_are_served(page):
    settings = {"pool_queries": True, "kernel_size": 1, "kernel_stride": 1}
    check_server(SERVER._replace(page_size=page), served(**settings))


def test_settings_that_pages_cannot_serve_are_refused_by_name():
    with pytest.raises(ValueError, match=r"use_nope .* after the rotary embedding") as error:
        check_server(SERVER, served(use_nope=True))
    assert_is_advice(error)


def test_settings_are_checked_before_the_page_size_is_known():
    with pytest.raises(ValueError, match="use_nope"):
        check_server(SERVER._replace(page_size=None), served(use_nope=True))


@pytest.mark.parametrize("page", [8, 24, 48])
def test_a_page_size_that_does_not_fit_is_refused(page):
    with pytest.raises(ValueError, match=f"--block-size .* got {page}") as error:
        check_server(SERVER._replace(page_size=page), served())
    assert "\n" not in str(error.value)


def assert_is_advice(error):
    assert "\n" not in str(error.value)
    assert "--additional-config '{\"infllm\": false}'" in str(error.value)
