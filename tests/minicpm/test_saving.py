"""MiniCPM is saved in the format it was read from, for programs without this package."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TorchAoConfig

import infllm_flex as ifx
from tests.minicpm.folders import CONFIG, LONGROPE, config, write

# Defaults of MiniCPM's own code for settings missing from config.json.
IMPLIED = {"attention_bias": False, "attention_dropout": 0.0}


def saved_tensors(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"torch_dtype": "bfloat16"},
        {"rope_scaling": None, "sparse_config": ...},
        {"tie_word_embeddings": True},
        {"rope_scaling": {**LONGROPE, "type": "longrope"}, "max_position_embeddings": 32},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
    ids=str,
)
def test_a_round_trip_changes_no_bit(tmp_path, changes):
    settings = config(**changes)
    dtype = getattr(torch, settings["torch_dtype"])
    weights = write(tmp_path / "m", settings, dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "saved")
    found = saved_tensors(tmp_path / "saved")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    implied = {**IMPLIED, "sparse_config": None}
    assert written.pop("transformers_version") != settings.pop("transformers_version")
    assert written == {**implied, **settings}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    ids = torch.randint(64, (1, 60))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_older_key_of_rope_scaling_stays_beside_the_newer(tmp_path):
    scaling = {n: value for n, value in LONGROPE.items() if n != "rope_type"}
    write(tmp_path / "m", config(rope_scaling={"type": "longrope", **scaling}))
    AutoModelForCausalLM.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["rope_scaling"] == {"type": "longrope", **LONGROPE}


def test_the_code_that_auto_map_names_comes_along_and_nothing_else(tmp_path):
    write(tmp_path / "m", config())
    (tmp_path / "above.py").write_text("secret")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    model.config.auto_map["AutoModelForImages"] = "../above.Model"
    model.config.auto_map["AutoTokenizer"] = ["tokenization.Slow", None]
    model.config.auto_map["AutoModel"] = "somebody/else--unrelated.Model"
    model.save_pretrained(tmp_path / "saved")
    copied = {path.name: path.read_text() for path in (tmp_path / "saved").glob("*.py")}
    assert copied == {
        f"{name}.py": f"raise SystemExit('{name} must not run')\n"
        for name in ("configuration_minicpm", "modeling_minicpm")
    }
    model.save_pretrained(tmp_path / "m")  # into the folder it was read from
    assert (tmp_path / "m" / "modeling_minicpm.py").read_text() == copied["modeling_minicpm.py"]


def test_code_beside_a_model_of_the_hub_is_named_with_it(tmp_path):
    name, revision = "openbmb/MiniCPM4-8B", "0" * 40
    cached = tmp_path / "models--openbmb--MiniCPM4-8B"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    (cached / "snapshots").mkdir()
    write(cached / "snapshots" / revision, config())
    offline = {"cache_dir": tmp_path, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(name, **offline)
    for _ in range(2):
        model.save_pretrained(tmp_path / "saved")
        written = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert written["auto_map"] == {
            kind: f"{name}--{reference}" for kind, reference in CONFIG["auto_map"].items()
        }
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert any(row.sparse for row in ifx.describe(model))


def test_in_several_files_and_another_precision(tmp_path):
    weights = write(tmp_path / "m", config())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    found = saved_tensors(tmp_path / "saved")
    assert all(torch.equal(found[n], weights[n].bfloat16()) for n in weights)
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype is torch.bfloat16


def test_settings_that_were_changed_are_saved(tmp_path):
    write(tmp_path / "m", config())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", rope_scaling=None, max_position_embeddings=256
    )
    model.config.sparse_config["topk"] = 4
    model.config.rope_parameters["rope_theta"] = 5e5
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["rope_scaling"] is None
    assert (written["rope_theta"], written["max_position_embeddings"]) == (5e5, 256)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert "5 blocks of 8" in str(ifx.describe(again))


def same_logits(model, other):
    ids = torch.randint(64, (1, 60))
    with torch.no_grad():
        return torch.equal(model(ids).logits, other(ids).logits)


def test_quantised_on_loading_it_is_saved_and_read_as_such(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    write(tmp_path / "m", config())
    how = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=how)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    assert any(row.sparse for row in ifx.describe(again))
    assert same_logits(model, again)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_brings_its_model_along(tmp_path):
    peft = pytest.importorskip("peft")
    write(tmp_path / "m", config())
    targets = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **targets)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert any(row.sparse for row in ifx.describe(again))
    assert same_logits(adapted, again)


def test_a_larger_vocabulary_is_saved(tmp_path):
    write(tmp_path / "m", config(tie_word_embeddings=True))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    model.resize_token_embeddings(70, mean_resizing=False)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.vocab_size == 70
    assert same_logits(model, again)
