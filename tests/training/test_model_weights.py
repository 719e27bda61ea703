"""Model folders whose files do not hold the weights of the model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from infllm_flex.training import model_weights
from infllm_flex.training.model import load_model
from infllm_flex.training.model_weights import check_weights, load_weights
from infllm_flex.training.preflight import dry_run
from infllm_flex.training.settings import DataSettings, ModelSettings
from tests.tiny_model import tiny_config, write_tiny_model
from tests.training.runs import settings

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return write_tiny_model(tmp_path / "model", num_hidden_layers=1)


def change(folder, function):
    tensors = function(load_file(folder / WEIGHTS))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def without_norm(tensors):
    return {name: value for name, value in tensors.items() if name != "model.norm.weight"}


def renamed(tensors):
    return {f"_orig_mod.{name}": value for name, value in tensors.items()}


def narrow(tensors):
    return tensors | {"lm_head.weight": tensors["lm_head.weight"][:, :8].contiguous()}


BROKEN = {
    "missing": (without_norm, "lacks 1 tensors of the model \\(model.norm.weight\\)"),
    "renamed": (renamed, "lacks 12 tensors .* and has 12 unknown ones \\(_orig_mod.lm_head"),
    "shape": (narrow, "lm_head.weight \\[258, 8\\] instead of \\[258, 64\\]"),
}


@pytest.mark.parametrize("has_accelerate", [True, False])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_without_all_weights_is_refused_before_and_when_it_is_loaded(
    folder, kind, has_accelerate, monkeypatch
):
    if has_accelerate:
        pytest.importorskip("accelerate")
    else:
        monkeypatch.setattr(model_weights.importlib.util, "find_spec", lambda name: None)
    function, message = BROKEN[kind]
    check_weights(folder, "model.path")
    change(folder, function)
    with pytest.raises(ValueError, match=f"^model.path: .*{message}"):
        check_weights(folder, "model.path")
    with pytest.raises(ValueError, match=f"^--model: .*{message}"):
        load_model(folder, torch.bfloat16, "--model")


@pytest.mark.parametrize("left", [0, 3, 5000])
def test_a_truncated_file_is_refused_in_one_line(folder, left):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:left])
    for load in (check_weights, load_weights):
        with pytest.raises(ValueError, match=r"^base: the weights in .* cannot be read: [^\n]+$"):
            load(folder, "base")


def test_a_missing_shard_is_refused_in_one_line(folder):
    LlamaForCausalLM(tiny_config()).save_pretrained(folder, max_shard_size="100KB")
    (folder / WEIGHTS).unlink()
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match=r"^base: the weights in [^\n]+$"):
        check_weights(folder, "base")


def test_tied_weights_need_no_file_of_their_own(tmp_path):
    folder = write_tiny_model(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    check_weights(folder, "model.path")
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tensors_that_no_model_uses_are_only_warned_of(folder):
    change(folder, lambda tensors: tensors | {"model.extra.weight": torch.zeros(2)})
    with pytest.warns(UserWarning, match=r"model.path: .* not use: model.extra.weight$"):
        check_weights(folder, "model.path")


def test_a_dry_run_refuses_more_layers_than_the_folder_has(folder, tmp_path, texts):
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"num_hidden_layers": 3}))
    data = DataSettings(source=str(texts), packing="documents", tokenizer="model")
    run = settings(tmp_path / "run", texts, model=ModelSettings(path=folder), data=data)
    with pytest.raises(ValueError, match=r"lacks 18 tensors .*layers.1.input_layernorm"):
        dry_run(run, 1)
