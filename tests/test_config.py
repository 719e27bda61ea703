import dataclasses
import json
import types

import pytest

from infllm_flex import InfLLMConfig


def test_defaults_are_those_of_the_released_checkpoints():
    config = InfLLMConfig()
    assert (config.local_blocks, config.num_selected) == (32, 96)
    assert (config.coarse_size, config.coarse_stride) == (128, 64)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        InfLLMConfig().topk = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("dense_len", "length", "dense"),
    [(8192, 8191, True), (8192, 8192, False), (-1, 1, False), (0, 1, False)],
)
def test_a_sequence_is_dense_iff_shorter_than_dense_len(dense_len, length, dense):
    assert InfLLMConfig(dense_len=dense_len).is_dense(length) is dense


@pytest.mark.parametrize(
    ("changes", "length", "dense", "visible"),
    [
        ({}, 8191, 8191, 8191),
        ({}, 8192, 0, 6144),
        ({"dense_by": "position"}, 8191, 8191, 8191),
        ({"dense_by": "position"}, 8192, 8191, 8191),
        ({"dense_by": "position", "dense_len": 4096}, 100_000, 4095, 6144),
        ({"dense_by": "position", "dense_len": 0}, 1, 0, 1),
        ({"dense_by": "position", "dense_len": -1}, 100_000, 0, 6144),
    ],
)
def test_the_rule_decides_how_many_queries_are_dense(changes, length, dense, visible):
    config = InfLLMConfig(**changes)
    assert (config.count_dense(length), config.max_visible(length)) == (dense, visible)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 1}, r"topk must be at least init_blocks \+ 1 = 2, .*got 1"),
        ({"topk": 2**40}, "topk must be between"),
        ({"topk": 2**31 - 1}, r"topk \+ window_size / block_size must be at most 2147483647"),
        ({"kernel_stride": 0}, "kernel_stride must be between 1"),
        ({"block_size": 40}, "block_size must be a multiple of kernel_stride = 16, got 40"),
        ({"kernel_size": 40}, "kernel_size must be a multiple of kernel_stride = 16, got 40"),
        ({"window_size": 100}, "window_size must be a multiple of block_size = 64, got 100"),
        ({"dense_len": -2}, "dense_len must be between -1"),
        ({"dense_len": float("nan")}, r"dense_len must be an integer, got nan \(float\)"),
        ({"window_size": float("nan")}, "window_size must be an integer, got nan"),
        ({"topk": True}, "topk must be an integer, got True"),
        ({"topk": "64"}, "topk must be an integer, got '64'"),
        ({"use_nope": 1}, "use_nope must be true or false, got 1"),
        ({"lse": "fine"}, "lse must be one of coarse, exact, got 'fine'"),
        ({"pool_queries": "yes"}, "pool_queries must be true or false, got 'yes'"),
        ({"pool_queries": True}, "kernel_size must be kernel_stride = 16, got 32"),
        (
            {"pool_queries": True, "kernel_size": 16, "lse": "exact"},
            "lse must be coarse where pool_queries is true, .*got 'exact'",
        ),
        ({"score_dtype": "fp8"}, "score_dtype must be one of same, float8, got 'fp8'"),
        ({"score_dtype": "float8"}, "score_dtype must be same where pool_queries is false"),
        (
            {"score_dims": 6, "pool_queries": True, "kernel_size": 16},
            "score_dims must be a multiple of 4, got 6",
        ),
        ({"score_dims": 32}, r"score_dims must be 0 \(all\) where pool_queries is false, got 32"),
        (
            {"score_dims": 32, "pool_queries": True, "kernel_size": 16, "use_nope": True},
            "score_dims must be 0 .* where use_nope is true",
        ),
        ({"engine": "cuda"}, "engine must be one of auto, flex, fused, got 'cuda'"),
        ({"dense_by": "query"}, "dense_by must be one of sequence, position, got 'query'"),
    ],
)
def test_an_impossible_value_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        InfLLMConfig(**settings)


def test_an_unknown_key_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"'top_k': 3 \(did you mean topk\?\)"):
        InfLLMConfig.from_dict({"top_k": 3})


@pytest.mark.parametrize("not_a_mapping", [[("topk", 3)], None, "topk: 3"])
def test_settings_must_be_a_mapping(not_a_mapping):
    with pytest.raises(ValueError, match="must be a mapping"):
        InfLLMConfig.from_dict(not_a_mapping)


def test_a_models_own_settings_are_read():
    released = {"kernel_size": 32, "window_size": 1024, "topk": 16, "dense_len": 4096}
    for model_config in (
        types.SimpleNamespace(sparse_config=released),
        {"sparse_config": released},
    ):
        assert InfLLMConfig.from_model_config(model_config) == InfLLMConfig(
            window_size=1024, topk=16, dense_len=4096
        )
    assert InfLLMConfig.from_model_config(types.SimpleNamespace()) == InfLLMConfig()


def test_what_a_checkpoint_carries_names_no_engine():
    config = InfLLMConfig(
        topk=16, engine="fused", pool_queries=True, kernel_size=16, dense_by="position"
    )
    written = config.to_sparse_config()
    assert "engine" not in written
    read = InfLLMConfig.from_model_config(json.loads(json.dumps({"sparse_config": written})))
    assert read == dataclasses.replace(config, engine="auto")
    old = {"sparse_config": {**written, "engine": "fused"}}
    assert InfLLMConfig.from_model_config(old) == config


def test_yaml_holds_a_section_or_the_settings_alone(tmp_path):
    alone, section = tmp_path / "alone.yaml", tmp_path / "section.yaml"
    alone.write_text("topk: 16\nwindow_size: 512\n")
    section.write_text("train: {steps: 3}\nattention:\n  topk: 16\n  window_size: 512\n")
    expected = InfLLMConfig(topk=16, window_size=512)
    assert InfLLMConfig.from_yaml(alone) == InfLLMConfig.from_yaml(section) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "missing.yaml"),
        ("", "empty"),
        ("- topk\n", "list"),
        ("attention:\n  topkk: 3\n", r"bad.yaml:2: attention\.topkk.*did you mean topk\?"),
        ("topk: many\n", r"bad.yaml:1: topk"),
    ],
    ids=["missing", "empty", "list", "unknown_key", "wrong_type"],
)
def test_a_bad_file_is_answered_in_one_line(tmp_path, text, message):
    path = tmp_path / ("missing.yaml" if text is None else "bad.yaml")
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        InfLLMConfig.from_yaml(path)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"directory|folder"):
        InfLLMConfig.from_yaml(tmp_path)
