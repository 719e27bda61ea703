"""Compiled, checkpointed and float8 layers train the same, and are restored afterwards."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from infllm_flex.patch.running_forward import current_forward
from infllm_flex.training.layer_transforms import check_float8, run_layers, use_float8
from infllm_flex.training.loop import train
from infllm_flex.training.loss import LanguageLoss
from infllm_flex.training.model import build_model, decoder_layers
from infllm_flex.training.settings import MemorySettings, ModelSettings, RunSettings
from infllm_flex.training.stage_attention import stage_attention
from tests.training.parallel_checks import losses
from tests.training.runs import LONG, TINY, settings, stage


def test_activation_checkpointing_changes_no_bit(tmp_path, texts):
    stages = {"long": replace(LONG, attention="sparse", max_length=128)}
    plain = settings(tmp_path / "plain", texts, stages=stages)
    again = settings(
        tmp_path / "again",
        texts,
        stages=stages,
        memory=MemorySettings(activation_checkpointing=True),
    )
    train(plain, show=False)
    train(again, show=False)
    found = [losses(run.run.folder / "metrics.jsonl") for run in (plain, again)]
    assert found[0] == found[1]


def test_the_layers_are_restored_after_the_block(tmp_path, texts):
    layers = decoder_layers(build_model(ModelSettings(tiny=TINY), 32))
    run = settings(tmp_path, texts, memory=MemorySettings(activation_checkpointing=True))
    before = [dict(vars(layer)) for layer in layers]
    with run_layers(layers, run, torch.device("cpu")):
        assert all("forward" in vars(layer) for layer in layers)
    assert [dict(vars(layer)) for layer in layers] == before


def test_a_recomputed_layer_belongs_to_the_forward_that_it_repeats(tmp_path, texts):
    """A compiled layer asks the running forward, and must be recomputed by the same graph."""
    run = settings(tmp_path, texts, memory=MemorySettings(activation_checkpointing=True))
    model, tokens = build_model(run.model, 128), torch.arange(128)[None]
    layers = decoder_layers(model)
    seen = []
    layers[0].self_attn.register_forward_pre_hook(lambda *_: seen.append(current_forward()))
    sparse = stage(attention="sparse", max_length=128)
    with (
        stage_attention(model, sparse, run.attention),
        run_layers(layers, run, torch.device("cpu")),
    ):
        LanguageLoss(model)(tokens, input_ids=tokens, use_cache=False).backward()
    assert seen[0] is not None
    assert [forward is seen[0] for forward in seen] == [True, True]
    assert current_forward() is None


@pytest.mark.slow  # compiles two layers
def test_compiled_layers_train_the_same_in_dense_and_sparse_stages(tmp_path, texts):
    stages = {"short": stage(steps=2), "long": replace(LONG, attention="sparse", max_length=128)}
    found = []
    for kind in ("never", "always"):
        run = settings(
            tmp_path / kind,
            texts,
            stages=stages,
            run=RunSettings(folder=tmp_path / kind, device="cpu", compile=kind),
            memory=MemorySettings(activation_checkpointing=True),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Inductor's own
            train(run, show=False)
        found.append(torch.tensor(losses(tmp_path / kind / "metrics.jsonl")))
    assert (found[0] - found[1]).abs().max() < 1e-4


def test_float8_rounds_the_products_of_the_layers_and_leaves_weights_and_names(tmp_path, texts):
    model = build_model(ModelSettings(tiny=TINY), 32)
    names = list(model.state_dict())
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        exact = model(tokens).logits
        with pytest.warns(UserWarning, match="the CPU emulates float8"):
            use_float8(model, torch.device("cpu"))
        rounded = model(tokens).logits
    assert list(model.state_dict()) == names
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()
    run = settings(
        tmp_path / "run",
        texts,
        model=ModelSettings(tiny=TINY, float8=True),
        stages={"only": stage(steps=20, batch_size=4)},
    )
    with pytest.warns(UserWarning, match="the CPU emulates float8"):
        outcome = train(run, show=False)
    found = losses(run.run.folder / "metrics.jsonl")
    assert found[-1][0] < found[0][0] - 1
    assert (outcome.model / "model.safetensors").is_file()


def test_float8_is_refused_without_a_gpu_or_layer_that_supports_it(monkeypatch):
    narrow = replace(TINY, hidden_size=24, intermediate_size=24, num_heads=2, num_kv_heads=1)
    with (
        pytest.raises(ValueError, match="no linear layer of LlamaForCausalLM has sizes"),
        pytest.warns(UserWarning, match="the CPU emulates float8"),
    ):
        use_float8(build_model(ModelSettings(tiny=narrow), 32), torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match="NVIDIA A100 has no float8"):
        check_float8(torch.device("cuda", 0))
