"""Decisions when a model is loaded: which are served sparsely, and which are refused."""

from __future__ import annotations

import pytest

from tests.vllm import served
from tests.vllm.served import SETTINGS, Judge, ask, engine, layers_of, make_prompts

vllm = pytest.importorskip("vllm")

PROMPTS = make_prompts(50, 400)
HEADS = {"vocab_size": 258, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}


def backends_of(llm):
    return {layer.attn_backend.__name__ for layer in layers_of(llm).values()}


def make_config(folder, settings=None, **arguments):
    """Only what happens before a model is loaded."""
    from vllm.engine.arg_utils import EngineArgs

    additional = {} if settings is None else {"infllm": settings}
    arguments = {"max_model_len": 1024, "dtype": "float32"} | arguments
    return EngineArgs(
        model=str(folder), additional_config=additional, **arguments
    ).create_engine_config()


def write_config(folder, kind, architecture, **settings):
    """A folder without weights."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**HEADS | settings)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    return served.write_minicpm(tmp_path_factory.mktemp("minicpm"), sparse_config=SETTINGS)


def test_a_model_without_settings_is_served_by_vllm_alone(folder):
    with engine(folder, block_size=64) as llm:
        assert backends_of(llm) == {"CPUAttentionBackend"}
        for layer in layers_of(llm).values():
            assert layer.kv_cache.is_contiguous()  # pages as long as without the plugin
        answers = ask(llm, PROMPTS)
    Judge(folder, SETTINGS).check_dense(answers)


def test_a_user_may_decline_a_models_settings(trained_folder):
    with engine(trained_folder, False) as llm:
        assert backends_of(llm) == {"CPUAttentionBackend"}
        answers = ask(llm, PROMPTS)
    Judge(trained_folder, SETTINGS).check_dense(answers)


def test_a_user_may_ask_for_the_settings_of_patch_model(folder):
    # Every key is scored from 32768 tokens on, which these prompts do not reach.
    with engine(folder, True, block_size=64) as llm:
        assert backends_of(llm) == {"InfLLMBackend"}
        (config,) = {layer.impl.config for layer in layers_of(llm).values()}
        answers = ask(llm, PROMPTS)
    assert config.scores_keys
    assert config.score_dtype == "same"
    Judge(folder, SETTINGS).check_dense(answers)


def test_models_with_and_without_settings_follow_each_other_in_a_process(folder):
    for settings, backend in ((SETTINGS, "InfLLMBackend"), (None, "CPUAttentionBackend")):
        with engine(folder, settings) as llm:
            assert backends_of(llm) == {backend}


def test_windowed_layers_stay_with_vllms_own_backend(tmp_path):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape = {name: value for name, value in served.SHAPE.items() if "token_id" not in name}
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **shape, head_dim=32, sliding_window=64, layer_types=kinds, query_pre_attn_scalar=4
    )
    folder = served.write_model(Gemma3ForCausalLM(config), tmp_path)
    with engine(folder, SETTINGS, block_size=64, max_num_batched_tokens=200) as llm:
        names = [layer.attn_backend.__name__ for layer in layers_of(llm).values()]
        assert names == ["CPUAttentionBackend", "InfLLMBackend"]
        answers = ask(llm, make_prompts(100, 700), of_prompt=True)
    Judge(folder, SETTINGS).check(answers)


def test_a_layer_compiles_with_the_rest_of_the_model(folder, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # traced, not compiled to C++
    with engine(folder, SETTINGS, enforce_eager=False) as llm:
        answers = ask(llm, PROMPTS)
    Judge(folder, SETTINGS).check(answers)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({**SETTINGS, "topc": 3}, {}, "did you mean topk"),
        ({**SETTINGS, "use_nope": True}, {}, "use_nope"),
        (SETTINGS, {"block_size": 48}, "--block-size does not fit .* got 48"),
        (SETTINGS, {"kv_cache_dtype": "fp8"}, "a cache in fp8"),
        (SETTINGS, {"attention_backend": "CPU_ATTN"}, "attention backend CPU_ATTN"),
        (SETTINGS, {"tensor_parallel_size": 4}, "2 key/value heads in 4 processes"),
    ],
    ids=lambda value: None,
)
def test_what_does_not_fit_is_refused_before_the_model_is_loaded(
    folder, settings, arguments, message
):
    with pytest.raises(ValueError, match=message) as error:
        make_config(folder, settings, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "architecture", "settings", "message"),
    [
        (
            "DeepseekV2",
            "DeepseekV2ForCausalLM",
            {"num_attention_heads": 2, "kv_lora_rank": 16, "q_lora_rank": None},
            "MLA",
        ),
        (
            "Mistral",
            "MistralForCausalLM",
            {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 128},
            "without keys to score",
        ),
        (
            "Bert",
            "BertModel",
            {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 1024},
            "encoders",
        ),
        (
            "Llama",
            "LlamaForCausalLM",
            {"num_attention_heads": 2, "intermediate_size": 64, "is_causal": False},
            "encoders",
        ),
    ],
    ids=["mla", "windowed", "encoder", "decoder_as_encoder"],
)
def test_models_that_cannot_be_sparse_are_refused_before_they_are_loaded(
    tmp_path, kind, architecture, settings, message
):
    folder = write_config(tmp_path, kind, architecture, **settings)
    arguments = {"skip_tokenizer_init": True}
    make_config(folder, **arguments)  # served without settings
    with pytest.raises(ValueError, match=message) as error:
        make_config(folder, SETTINGS, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "architecture", "settings", "message"),
    [
        (
            "Gemma2",
            "Gemma2ForCausalLM",
            {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32},
            "soft cap",
        ),
        ("Bloom", "BloomForCausalLM", {"n_head": 2}, "ALiBi"),
        (
            "GptOss",
            "GptOssForCausalLM",
            {
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "num_local_experts": 2,
                "intermediate_size": 64,
            },
            "sinks",
        ),
        (
            "Llama4Text",
            "Llama4ForCausalLM",
            {
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "num_local_experts": 2,
                "intermediate_size": 64,
                "intermediate_size_mlp": 64,
                "interleave_moe_layer_step": 3,  # none of two layers: no group of experts
                "attention_chunk_size": 256,
                "layer_types": ["chunked_attention", "full_attention"],
            },
            "ChunkedLocalAttention",
        ),
        (
            "HrmText",
            "HrmTextForCausalLM",
            {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32},
            "EncoderOnlyAttention",
        ),
    ],
    ids=["soft_cap", "alibi", "sinks", "chunks", "prefix_lm"],
)
def test_layers_that_ask_for_more_are_refused_when_they_are_loaded(
    tmp_path, kind, architecture, settings, message
):
    folder = write_config(tmp_path, kind, architecture, **settings)
    arguments = {"load_format": "dummy", "skip_tokenizer_init": True}
    with (
        pytest.raises(ValueError, match=f"InfLLM-V2 does not serve .*{message}") as error,
        engine(folder, SETTINGS, **arguments),
    ):
        pass
    assert "\n" not in str(error.value)


def test_a_cache_too_small_for_one_sequence_is_refused_at_the_start(folder):
    # Keys and values of 1024 tokens in 2 layers, float32; compressed keys are counted, too.
    keys_and_values = 2 * 1024 * 2 * 2 * 32 * 4
    with engine(folder, block_size=64, kv_cache_memory_bytes=keys_and_values + (64 << 10)):
        pass
    with (
        pytest.raises(ValueError, match="1024"),
        engine(folder, SETTINGS, block_size=64, kv_cache_memory_bytes=keys_and_values + (64 << 10)),
    ):
        pass


def test_another_version_of_vllm_serves_only_models_without_settings(folder, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    make_config(folder)
    with pytest.raises(ValueError, match=r"serves models in vLLM 0.32, got 0.33.1") as error:
        make_config(folder, SETTINGS)
    assert "\n" not in str(error.value)


def test_another_plugins_backend_is_not_replaced(folder, monkeypatch):
    from vllm.v1.attention.backends import registry

    custom = registry.AttentionBackendEnum.CUSTOM
    make_config(folder)  # loads the plugin
    monkeypatch.setitem(registry._ATTN_OVERRIDES, custom, "another.plugin.Backend")
    make_config(folder)
    with pytest.raises(ValueError, match=r"CUSTOM is another.plugin.Backend") as error:
        make_config(folder, SETTINGS)
    assert "\n" not in str(error.value)


def test_the_backend_without_settings_is_refused(folder):
    with (
        pytest.raises(ValueError, match="CUSTOM is InfLLM-V2, which needs settings"),
        engine(folder, attention_backend="CUSTOM"),
    ):
        pass
