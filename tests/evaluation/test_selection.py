import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from evaluation.selection import LayerInputs, judge_selection, recorded_inputs
from infllm_flex import patch_model
from tests.inputs import make_qkv, small_config

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
SMALL = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window_size": 32, "topk": 3}


def tiny_llama(**overrides):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        **overrides,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_layers_leave_the_inputs_of_dense_attention():
    model, tokens = tiny_llama(), torch.arange(256)[None]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        patch_model(model, small_config())
        with recorded_inputs(model) as inputs:
            assert torch.equal(model(tokens, use_cache=False).logits, expected)
        assert not torch.equal(model(tokens, use_cache=False).logits, expected)
    assert len(inputs) == 2
    for query, key, scale in inputs.values():
        assert query.shape == (1, 4, 256, 8)
        assert key.shape == (1, 2, 256, 8)
        assert scale == pytest.approx(8**-0.5)


def test_the_best_blocks_hold_most_and_all_blocks_hold_everything():
    query, key, _ = make_qkv(400)
    report = judge_selection(LayerInputs(query, key, 0.25), small_config())
    assert report.blocks == small_config().num_selected
    assert report.mass_best > report.mass > 0
    assert report.mass_best > report.mass_window > 0
    assert list(report.inflation.values()) == sorted(report.inflation.values())
    assert report.inflation[2] >= 1
    everything = judge_selection(LayerInputs(query, key, 0.25), small_config(topk=10))
    assert everything.mass > report.mass


def test_a_key_that_all_attend_to_is_found():
    query, key, _ = make_qkv(400, Hq=2, Hkv=1)
    key[:, :, 64:80] = 3.0
    report = judge_selection(LayerInputs(query.abs(), key, 1.0), small_config())
    assert report.mass > 0.99
    assert report.mass_window < 0.01


def test_single_keys_that_all_attend_to_are_distinguished_from_spread_attention():
    query, key, _ = make_qkv(400, Hq=4, Hkv=2)

    def share(at=None):
        sinks = key.clone()
        if at is not None:
            sinks[:, 1, at] = 90.0  # one key, of one of two KV heads
        return judge_selection(LayerInputs(query.abs(), sinks, 0.05), small_config()).mass_single

    assert share() < 0.1
    assert 0.5 < share(90) < 0.55
    assert share(3) < 0.05  # in the first block, which is always selected


def test_a_short_sequence_says_how_long_it_must_be():
    query, key, _ = make_qkv(100)
    with pytest.raises(ValueError, match="take at least 160"):
        judge_selection(LayerInputs(query, key, 0.25), small_config())


@pytest.fixture
def evaluate(monkeypatch, capsys):
    def run(*arguments):
        spec = importlib.util.spec_from_file_location("evaluate", ROOT / "scripts/evaluate.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        status = module.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_command_shows_a_row_per_layer(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("def f(x): return x\n" * 40)
    settings = [f"attention.{name}={value}" for name, value in SMALL.items()]
    common = ("--model", tmp_path / "model", "--text", tmp_path / "text", "--device", "cpu")
    status, out, err = evaluate(*common, "--length", 400, *settings)
    assert status == 0, err
    assert "model.layers.0.self_attn" in out
    assert "model.layers.1.self_attn" in out
    assert "5 blocks of 16 a token = 80 tokens" in out
    for bad, message in (
        (("--length", 9999), "--length must be between 1 and the text's 760 tokens, got 9999"),
        (("--length", 400, "topk=3"), "settings must be written attention.key=value, got topk=3"),
        (("--length", 400, "attention.top=3"), "topk"),
        (("--length", 400, "--device", "cuda"), "got cuda where PyTorch sees no GPU"),
        (("--length", 400, "--device", "gpu"), "gpu"),
    ):
        status, _, err = evaluate(*common, *bad)
        assert status == 2
        assert message in err
