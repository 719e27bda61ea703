"""The example of transformers' Trainer runs, trains sparsely, and saves what loads sparse again."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytest

import infllm_flex as ifx
from infllm_flex import attention
from infllm_flex.training.model import load_model

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
SCRIPT = Path(__file__).parents[2] / "scripts" / "train_with_transformers.py"


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_with_transformers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_with_transformers.py", *map(str, arguments)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # accelerate's about pinned memory
            module.main()

    return run


def test_the_example_trains_sparsely_and_saves_a_model_that_knows_it(
    example, tmp_path, monkeypatch, capsys
):
    calls, real = [], attention.choose_blocks

    def select(query, *args, **kwargs):
        calls.append(query.shape)
        return real(query, *args, **kwargs)

    monkeypatch.setattr(attention, "choose_blocks", select)
    example("--length", 512, "--steps", 6, "--out", tmp_path)
    assert calls == [(2, 4, 512, 32)] * 2 * 6  # two layers, six steps
    assert "model.layers.1.self_attn" in capsys.readouterr().out
    (state,) = tmp_path.glob("checkpoint-6/trainer_state.json")
    first = json.loads(state.read_text())["log_history"][0]
    assert first["loss"] < 6
    model = ifx.patch_model(load_model(tmp_path))
    assert model.model.layers[0].self_attn.infllm_layer.config.topk == 26
