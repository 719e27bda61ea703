"""Settings that cannot work are refused when they are read, with the reason."""

from __future__ import annotations

import pytest

from infllm_flex.strict_yaml import ConfigError, build_dataclass, load_yaml
from infllm_flex.training.settings import TrainingSettings

COMPLETE = """\
run: {folder: runs/x}
model: {tiny: {}}
stages:
  a: {max_length: 8, batch_size: 1, steps: 4, learning_rate: 2e-5}
"""


@pytest.fixture
def read(tmp_path):
    def with_overrides(*overrides):
        path = tmp_path / "x.yaml"
        path.write_text(COMPLETE)
        return build_dataclass(TrainingSettings, load_yaml(path, overrides))

    return with_overrides


def test_the_shortest_config_is_complete(read):
    run = read()
    assert run.stages["a"].learning_rate == 2e-5
    assert run.total_steps == 4
    assert run.attention.block_size == 64


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("stages.a.learning_rate=0", "must be above 0 and at most 1, got 0.0"),
        ("stages.a.steps=0", "must be between 1 and 2147483647, got 0"),
        ("stages={}", "must name at least one stage, got none"),
        ("model.tiny.hidden_size=100", "must be a multiple of twice num_heads = 8, got 100"),
        ("model.tiny.num_kv_heads=3", "num_heads must be a multiple of num_kv_heads = 3, got 4"),
        ("model.tiny.head_dim=15", "must be even, got 15"),
        ("model.tiny.head_dim=258", "must be between 2 and 256, got 258"),
        ("model.tiny.rope_theta=0", "must be above 1, got 0.0"),
        ("model.path=org/name", "exactly one of path, hub and tiny must be given"),
        ("model={path: org/name}", "must be an existing local folder, got org/name"),
        ("data.source=/no/such/folder", "must be python_stdlib or a local folder or file"),
        ("data.held_out_percent=91", "must be between 0 and 90, got 91"),
        ("data.pattern=''", "must be a file name pattern, got ''"),
        (
            "data.pattern='*.jsonl'",
            "must be plain text with packing: stream, got '*.jsonl': set",
        ),
        ("data.workers=-1", "must be between 0 and 256, got -1"),
        ("data.tokenizer=model", "tokenizer has no effect with packing: stream, got model: set"),
        (
            "data={packing: documents, tokenizer: gpt}",
            "must be bytes, model or a local folder, got",
        ),
        ("data={packing: documents, damaged_percent: 101}", "must be between 0 and 100, got 101.0"),
        ("data={packing: documents, text_field: ''}", "must name a key or column, got ''"),
        (
            "data={packing: documents, cache: pyproject.toml}",
            "must be a folder, got pyproject.toml",
        ),
        ("data.packing=rows", "expected one of stream, documents, got rows"),
        ("stages.a.length_buckets=[8]", "must ascend and stay below max_length = 8, got [8]"),
        ("stages.a.length_buckets=[4, 2]", "must ascend and stay below max_length = 8, got [4, 2]"),
        ("optim.beta2=1", "must be at least 0 and below 1, got 1.0"),
        ("optim.clip_norm=0", "must be above 0, got 0.0"),
        ("checkpoint.keep=1", "must be between 2 and 1000, got 1"),
        ("log.every=0", "must be between 1 and 2147483647, got 0"),
        ("run.seed=-1", "must be between 0 and 9223372036854775807, got -1"),
        ("attention.topk=1", "must be at least init_blocks + 1 = 2"),
        ("compare.sequences=0", "must be between 1 and 100000, got 0"),
        ("compare.length=1024", "must be between 2048 and 8192, got 1024"),
    ],
)
def test_an_impossible_setting_is_refused_with_its_bounds(read, override, problem):
    with pytest.raises(ConfigError) as caught:
        read(override)
    (mistake,) = caught.value.mistakes
    assert problem in mistake.problem
    assert mistake.where == f"override {override!r}"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_model_folder_must_be_complete(read, tmp_path, missing):
    for name in {"config.json", "model.safetensors"} - {missing}:
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match="must hold"):
        read(f"model={{path: {tmp_path}}}")


def test_a_wrong_section_is_not_reported_at_another_that_depends_on_it(read):
    with pytest.raises(ConfigError) as error:
        read("attention={block_size: 0}", "stages.a.selection_loss={queries: 4}")
    assert len(error.value.mistakes) == 1


def test_a_stage_must_be_long_enough_for_its_schedule(read):
    with pytest.raises(
        ConfigError, match=r"steps: must be at least warmup_steps \+ decay_steps = 9, "
    ):
        read("stages.a.warmup_steps=4", "stages.a.decay_steps=5")


def test_pickled_weights_are_refused(read, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"must hold \*\.safetensors weights"):
        read(f"model={{path: {tmp_path}}}")
