"""Configurations of model folders and of the hub's cache, read without running their code."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import infllm_flex as ifx
from infllm_flex.training.loop import train
from infllm_flex.training.model import build_meta_model, build_model, load_model
from infllm_flex.training.model_config import find_model
from infllm_flex.training.settings import ModelSettings, TinyModelSettings
from tests.training.runs import ATTENTION, settings, stage

SIZE = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
MINICPM = {
    **SIZE,
    "model_type": "minicpm",
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 8,
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "sparse_config": {"block_size": 8, "kernel_size": 4, "kernel_stride": 2, "window_size": 8},
}


@pytest.fixture
def minicpm(tmp_path):
    """A MiniCPM model folder, and the Llama model with the equivalent scaled weights."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=False)).eval()
    folder = tmp_path / "minicpm"
    folder.mkdir()
    save_file(llama.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(MINICPM))
    (folder / "modeling_minicpm.py").write_text("raise SystemExit('this code must not run')\n")
    depth = 1.4 / math.sqrt(2)
    with torch.no_grad():
        llama.model.embed_tokens.weight *= 12
        llama.lm_head.weight /= 32 / 8
        for layer in llama.model.layers:
            layer.self_attn.o_proj.weight *= depth
            layer.mlp.down_proj.weight *= depth
    return folder, llama


def test_minicpm_equals_its_own_code(minicpm):
    folder, llama = minicpm
    model = load_model(folder).eval()
    tokens = torch.randint(256, (2, 40))
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, llama(tokens).logits, atol=1e-5)
    outline = build_meta_model(ModelSettings(path=folder), 64)
    assert {n: w.shape for n, w in outline.named_parameters()} == {
        n: w.shape for n, w in model.named_parameters()
    }


def test_minicpm_keeps_its_sparse_config_and_its_type_when_fine_tuned(minicpm, tmp_path, texts):
    folder, _ = minicpm
    assert not any(row.patched_through for row in ifx.describe(load_model(folder)))
    layer = ifx.patch_model(load_model(folder)).model.layers[0].self_attn.infllm_layer
    assert (layer.config.block_size, layer.config.topk) == (8, 64)
    run = settings(
        tmp_path / "run",
        texts,
        model=ModelSettings(path=folder),
        stages={"only": stage(attention="sparse", max_length=96, steps=2)},
    )
    outcome = train(run, show=False)
    written = json.loads((outcome.model / "config.json").read_text())
    assert written["sparse_config"]["topk"] == ATTENTION.topk
    for name in ("model_type", "architectures", "auto_map", "scale_emb", "dim_model_base"):
        assert written[name] == MINICPM[name]
    assert (outcome.model / "modeling_minicpm.py").is_file()  # for programs that run it
    assert load_model(outcome.model).config.embedding_multiplier == 12


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_longrope_is_converted(minicpm, key):
    folder, _ = minicpm
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {key: "longrope", "original_max_position_embeddings": 128, **factors}
    (folder / "config.json").write_text(json.dumps({**MINICPM, "rope_scaling": rope}))
    config = load_model(folder).config
    assert config.rope_parameters["rope_type"] == "longrope"
    assert config.rope_parameters["rope_theta"] == 10_000.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json cannot be read"),
        (json.dumps({**MINICPM, "num_experts": 8}), "with experts is not supported"),
        ('{"model_type": "unheard"}', "unheard"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(minicpm, content, message):
    folder, _ = minicpm
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        build_meta_model(ModelSettings(path=folder), 64)


def test_a_run_asks_the_hub_once_and_only_if_the_settings_allow_it(
    minicpm, tmp_path, texts, monkeypatch
):
    folder, _ = minicpm
    asked = []

    def snapshot_download(name, *, revision, local_files_only, allow_patterns):
        asked.append((name, revision, local_files_only))
        assert not any(pattern.endswith((".py", ".bin")) for pattern in allow_patterns)
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    run = settings(tmp_path / "run", texts, model=ModelSettings(hub="Qwen/Qwen3-8B"))
    with pytest.raises(
        ValueError, match=r"Qwen3-8B is not in the local cache: set model\.download to true"
    ):
        train(run, show=False)
    assert not (tmp_path / "run").exists()
    download = replace(run.model, download=True, revision="abc")
    assert find_model(replace(run, model=download)).model.path == folder
    train(replace(run, model=download), show=False)
    once_each = [("Qwen/Qwen3-8B", "abc", False)] * 2
    assert asked == [("Qwen/Qwen3-8B", "main", True), *once_each]


def test_a_tiny_models_heads_may_be_wider_than_its_share():
    tiny = TinyModelSettings(
        num_layers=1, hidden_size=48, num_heads=16, num_kv_heads=1, head_dim=128
    )
    attention = build_model(ModelSettings(tiny=tiny), 64).model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (16 * 128, 48)
    assert attention.k_proj.weight.shape == (128, 48)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of path, hub and tiny"),
        ({"hub": "../secrets"}, "hub must be a name such as"),
        ({"hub": "a/b/c"}, "hub must be a name such as"),
        ({"path": "x", "download": True}, "download must not be set without hub"),
    ],
)
def test_contradicting_model_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ModelSettings(**values)
