"""Every file in examples/ runs, does what it says, and is in the table of examples/README.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import infllm_flex as ifx
from tests.tiny_model import SPARSE_CONFIG, tiny_config, write_tiny_model

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TEXT = "One step follows another. " * 12  # 312 bytes


def run(script: str, *arguments: object, cwd: Path = ROOT) -> str:
    """Run an example in a process of its own without a network; return its output."""
    paths = [str(ROOT), str(ROOT / "custom_ops"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    pytest.importorskip("transformers")
    return write_tiny_model(tmp_path_factory.mktemp("model"), sparse_config=SPARSE_CONFIG)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_readme_lists_every_example_and_nothing_else():
    table = (EXAMPLES / "README.md").read_text()
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml")}
    rows = [line for line in table.splitlines() if line.startswith("| [`")]
    listed = {name for line in rows for name in line.split("|")[1].split("`")[1::2]}
    assert listed == files


def test_inference_generates_the_same_tokens_compiled_and_not():
    pytest.importorskip("transformers")
    printed = run("inference.py", "--backend", "eager", "--new-tokens", 6)
    assert "model.layers.1.self_attn  transformers     sparse from 256 tokens on" in printed
    assert "6 of 6 generated tokens are the same" in printed


def test_inference_takes_a_model_a_text_and_its_settings(model_folder, text_file):
    options = ["--model", model_folder, "--text", text_file, "--dense-len", 200]
    printed = run("inference.py", *options, "--backend", "eager", "--new-tokens", 6)
    assert printed.count("sparse from 200 tokens on: 3 blocks of 16") == 2
    assert f"6 tokens after {len(TEXT)} in" in printed
    assert "6 of 6 generated tokens are the same" in printed


def test_trainer_trains_and_saves_a_model_that_patches_itself_alike(tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import AutoModelForCausalLM

    printed = run("trainer.py", "--length", 512, "--steps", 6, "--out", tmp_path)
    assert printed.count("sparse from 512 tokens on: 28 blocks of 16") == 2
    (state,) = tmp_path.glob("checkpoint-6/trainer_state.json")
    assert json.loads(state.read_text())["log_history"][0]["loss"] < 6
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="infllm_flex")
    rows = ifx.describe(model)
    assert [row.sparse for row in rows] == [True, True]
    assert [row.config.topk for row in rows] == [26, 26]


def test_trainer_takes_a_model_and_a_text(model_folder, text_file, tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    out = tmp_path / "out"
    options = ["--model", model_folder, "--text", text_file, "--out", out]
    printed = run("trainer.py", *options, "--length", 128, "--steps", 1)
    assert printed.count("sparse from 96 tokens on: 3 blocks of 16") == 2
    saved = json.loads((out / "config.json").read_text())["sparse_config"]
    # How to compute is not saved, only what.
    assert {k: v for k, v in SPARSE_CONFIG.items() if k != "engine"}.items() <= saved.items()


def test_plain_pytorch_is_trained_densely_then_sparsely():
    printed = run("plain_pytorch.py", "--steps", 2, "--length", 512)
    assert printed.count("sparse from 256 tokens on: 12 blocks of 16") == 2
    assert "128 bytes, step 2: loss" in printed
    assert "512 bytes, step 2: loss" in printed
    losses = {line.split(":")[0]: float(line.split()[-1]) for line in printed.splitlines()[-2:]}
    assert losses["sparse"] != losses["dense, the same weights"]


def test_own_decoder_generates_what_one_pass_says():
    printed = run("own_decoder.py", "--prompt", 260, "--new-tokens", 40)
    assert "largest difference from one pass over 299 tokens" in printed


def test_the_string_in_the_yaml_file_alone_makes_a_model_sparse():
    transformers = pytest.importorskip("transformers")
    yaml = pytest.importorskip("yaml")
    options = yaml.safe_load((EXAMPLES / "trl_sft.yaml").read_text())
    config = tiny_config(sparse_config=SPARSE_CONFIG)

    def logits(implementation, length, patch=False):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation
        )
        model = ifx.patch_model(model) if patch else model
        with torch.no_grad():
            return model(torch.arange(length)[None], use_cache=False).logits

    named = options["attn_implementation"]
    for length in (95, 96, 200):  # dense_len is 96
        assert torch.equal(logits(named, length), logits("sdpa", length, patch=True))
        assert torch.equal(logits(named, length), logits("sdpa", length)) == (length < 96)


def test_trl_fine_tunes_sparsely(model_folder, tmp_path):
    pytest.importorskip("trl", reason="not among the dependencies: pip install trl")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{i} " * 100}) + "\n" for i in range(20)))
    config = (EXAMPLES / "trl_sft.yaml").read_text()
    config = config.replace("dataset_name: trl-lib/Capybara\n", "")
    config += f"datasets:\n- path: json\n  data_files: {texts}\nuse_cpu: true\n"
    (tmp_path / "sft.yaml").write_text(config)
    options = ["--model_name_or_path", model_folder, "--max_steps", 2, "--max_length", 256]
    printed = run("trl_sft.py", "--config", tmp_path / "sft.yaml", *options, cwd=tmp_path)
    assert "Training completed" in printed
    assert (tmp_path / "runs/trl_sft/model.safetensors").is_file()
