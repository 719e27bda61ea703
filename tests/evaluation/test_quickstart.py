"""The comparison of fine-tunings runs through, says what it found, and goes on where it stopped."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from infllm_flex.evaluation.by_position import Bucket
from tests.training.runs import write_texts

SCRIPT = Path(__file__).parents[2] / "scripts" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quickstart"]


@pytest.fixture
def config(tmp_path):
    texts = write_texts(tmp_path / "texts", files=20, length=600)
    path = tmp_path / "small.yaml"
    path.write_text(
        f"""\
run: {{folder: {tmp_path / "out"}, device: cpu, threads: 1}}
model:
  tiny: {{num_layers: 1, hidden_size: 32, intermediate_size: 32, num_heads: 4, num_kv_heads: 2}}
attention:
  {{kernel_size: 4, kernel_stride: 2, block_size: 8, window_size: 8, topk: 3, dense_len: 64,
    engine: fused}}
data: {{source: {texts}, held_out_percent: 20}}
stages:
  short:
    {{max_length: 16, batch_size: 2, steps: 2, learning_rate: 1e-2, decay_steps: 1,
      attention: dense}}
  long:
    {{max_length: 128, batch_size: 2, steps: 2, learning_rate: 1e-2, decay_steps: 1,
      rope_theta: 1e5}}
compare: {{windows: 4, batch_size: 2}}
"""
    )
    return path


@pytest.fixture
def run(quickstart, config, monkeypatch, capsys):
    def with_overrides(*overrides):
        monkeypatch.setattr(sys, "argv", ["quickstart.py", "--config", str(config), *overrides])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.showwarning", None)  # the command sets its own
            status = quickstart.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return with_overrides


def test_four_models_are_compared_in_a_table_a_plot_and_words(run, tmp_path):
    status, out, _ = run()
    assert status == 0
    for name in ("short, as it is", "dense", "sparse", "window only"):
        assert f"\n{name} " in out
    assert "What to see" in out
    folder = tmp_path / "out"
    assert (folder / "bits_by_position.png").stat().st_size > 10_000
    rows = json.loads((folder / "results.json").read_text())
    assert [row["bits per byte at"] for row in rows][2] == "sparse"
    assert rows[1]["65-128"] != rows[2]["65-128"] != rows[3]["65-128"]
    # Before the budget is spent nothing is left out, so what differs comes from training alone.
    metrics = (folder / "sparse" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["sparse_layers"] == 1.0
    again = run()
    assert again[0] == 0
    assert again[1].partition("minutes in all")[0][:-5] == out.partition("minutes in all")[0][:-5]


def test_other_settings_in_the_same_folder_are_refused_with_status_2(run):
    assert run()[0] == 0
    status, _, err = run("stages.long.steps=3")
    assert status == 2
    assert "holds a run with another stages" in err


def test_a_comparison_needs_a_short_and_a_long_stage(run):
    status, _, err = run(
        "stages={long: {max_length: 128, batch_size: 1, steps: 1, learning_rate: 1}}"
    )
    assert status == 2
    assert err == "stages: expected a short stage before the long one\n"


def test_the_words_follow_the_numbers(quickstart):
    base = 2 + torch.rand(16, 8) * 0.01
    repeats = torch.zeros(16, 8, dtype=torch.bool)
    repeats[:, 5] = True

    def words(sparse, window):
        bits = {"dense": base, "sparse": base + sparse, "window only": base + window}
        return quickstart.explain_result(bits, Bucket(5, 8), repeats)

    assert "costs +0.100 ± 0.000" in words(0.01, 0.1)
    assert "closes 90% of the gap" in words(0.01, 0.1)
    assert "train longer to compare" in words(0.0, 0.0)
    assert "does no better than the window alone" in words(0.2, 0.1)
