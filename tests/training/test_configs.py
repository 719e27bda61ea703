"""The files of configs/ are usable, and their comments are true."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch

from infllm_flex.patch.head_groups import Heads
from infllm_flex.patch.settings import settings_by_rule
from infllm_flex.strict_yaml import build_dataclass, load_yaml
from infllm_flex.training.settings import TrainingSettings
from tests.checkout import ROOT
from tests.training.runs import write_lines


@pytest.mark.parametrize("name", ["quickstart", "tiny_bytes"])
def test_the_tiny_configs_are_sparse_in_their_long_stage(name):
    run = build_dataclass(TrainingSettings, load_yaml(ROOT / "configs" / f"{name}.yaml"))
    short, long = run.stages["short"], run.stages["long"]
    assert (short.attention, long.attention) == ("dense", "sparse")
    assert long.max_length >= 8 * short.max_length
    assert not run.attention.is_dense(long.max_length)
    assert run.attention.num_selected * run.attention.block_size < long.max_length / 4


def test_every_config_starts_with_the_command_that_uses_it():
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        header = path.read_text().partition("\n\n")[0]
        assert header.startswith("#"), path
        assert f"configs/{path.name}" in header, path


# The sizes in the models' own config.json.
_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
_QWEN3 = {
    **_LLAMA3,
    "model_type": "qwen3",
    "vocab_size": 151936,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
_MINICPM4 = {
    **_LLAMA3,
    "model_type": "minicpm",
    "vocab_size": 73448,
    "intermediate_size": 16384,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
}
LARGE = {
    "minicpm4_8b_32k": (_MINICPM4, 32768, 8.19),
    "llama3_8b_64k": (_LLAMA3, 65536, 8.03),
    "qwen3_8b_128k": (_QWEN3, 131072, 8.19),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_config_passes_its_dry_run_and_its_comment_gives_the_estimate(
    finetune, tmp_path, monkeypatch, name
):
    gpu = torch.device("cuda")  # on a CPU the memory of the process would be added
    monkeypatch.setattr("infllm_flex.training.preflight.pick_device", lambda device: gpu)
    description, length, billions = LARGE[name]
    folder, texts = tmp_path / "model", tmp_path / "texts"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(description))
    (folder / "model.safetensors").write_bytes(b"")  # 16 GB, which are not read
    monkeypatch.setattr("infllm_flex.training.preflight.check_weights", lambda *_: None)
    texts.mkdir()
    documents = [size for size in (3000, 9000, 20_000, 30_000, 60_000, 130_000) for _ in range(20)]
    write_lines(texts / "a.jsonl", [f"{n} " * (size // 5) for n, size in enumerate(documents)])
    config = ROOT / "configs" / f"{name}.yaml"
    overrides = [
        f"run.folder={tmp_path / 'run'}",
        "model.hub=null",
        f"model.path={folder}",
        f"data.source={texts}",
        "data.tokenizer=bytes",  # the folder has no tokenizer
        f"data.cache={tmp_path / 'tokens'}",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, out, err = finetune("--config", config, "--dry-run", "--processes=8", *overrides)
    assert status == 0
    assert err.count("warning: ") == 1
    assert "data.tokenizer: bytes are not the" in err
    assert f"{billions} billion weights" in out
    assert f"long: first batch of a process 1 x {length} tokens" in out
    (estimate,) = re.findall(r"memory, estimated: (.*)", out)
    assert re.search(r"not measured: (.*)", config.read_text())[1] == estimate
    assert float(estimate.split()[0]) < 72  # of 80 GB, which are 74.5 GiB


@pytest.mark.parametrize("name", ["llama3_8b_64k", "qwen3_8b_128k"])
def test_a_large_config_attends_as_patch_model_would(name):
    """Its comment says so; the model was trained with dense attention."""
    elsewhere = ["data.source=python_stdlib"]  # the text is not here
    settings = load_yaml(ROOT / "configs" / f"{name}.yaml", elsewhere)
    config = build_dataclass(TrainingSettings, settings)
    heads = Heads(head_dim=128, per_group=4)
    by_rule = settings_by_rule(True, heads, suits_score_dims=lambda num_dims: True)
    assert config.attention == by_rule.config


def test_a_large_config_without_its_text_names_the_missing_folder(finetune, tmp_path):
    config = ROOT / "configs" / "qwen3_8b_128k.yaml"
    status, _, err = finetune("--config", config, f"run.folder={tmp_path / 'run'}", "--dry-run")
    assert status == 2
    assert err.endswith(
        "data.source: must be python_stdlib or a local folder or file, got 'data/long'\n"
    )
