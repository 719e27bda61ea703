"""A stage with a selection loss: what it changes, what it logs, where it is refused."""

from __future__ import annotations

import signal
import warnings
from dataclasses import replace

import pytest
import torch

from infllm_flex import reference_loss
from infllm_flex.patch import describe, observe_attention, patch_model
from infllm_flex.strict_yaml import ConfigError, build_dataclass, load_yaml
from infllm_flex.training.data import Batch, PackedSampler
from infllm_flex.training.loop import train
from infllm_flex.training.model import build_model, decoder_layers
from infllm_flex.training.schedule import Position
from infllm_flex.training.settings import (
    CheckpointSettings,
    DataSettings,
    MemorySettings,
    ModelSettings,
    ParallelSettings,
    RunSettings,
    SelectionLossSettings,
    TrainingSettings,
)
from infllm_flex.training.stage_attention import stage_attention
from tests.training.runs import (
    ATTENTION,
    TINY,
    course,
    interrupted,
    metrics,
    settings,
    stage,
    weights_hash,
    write_lines,
)

SIGNAL = SelectionLossSettings(weight=1.0, queries=32)
LONG = stage(attention="sparse", max_length=128, selection_loss=SIGNAL)


def run_of(folder, texts, only=LONG, **changes):
    return settings(folder, texts, stages={"only": only}, **changes)


def selection_losses(run):
    return [line.get("selection_loss") for line in metrics(run)]


def test_weights_get_the_gradient_of_the_definition():
    model, tokens = build_model(ModelSettings(tiny=TINY), 96), torch.arange(96)[None]
    weights = [
        linear.weight
        for layer in decoder_layers(model)
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    ]
    with torch.no_grad():
        for weight in weights:
            weight *= 8  # random weights alone would attend to all tokens alike
    some = SelectionLossSettings(weight=0.5, queries=96)
    only = replace(LONG, max_length=96, batch_size=1, selection_loss=some)
    with stage_attention(model, only, ATTENTION) as attention:
        attention.selection_loss.begin_step(Position("only", only, 0))
        attention.selection_loss.set_batch(Batch(tokens, tokens), torch.device("cpu"))
        (model(tokens).logits.sum() * 0).backward()
    losses = []

    def observe(layer):
        def look(out, query, key, scale):
            losses.append(reference_loss.selection_loss(query, key, ATTENTION, scale=scale).mean())
            return out

        return look

    patch_model(model, ATTENTION)
    with observe_attention(model, observe):
        model(tokens)
    expected = torch.autograd.grad(0.5 * torch.stack(losses).mean(), weights)
    assert losses[0] > 1e-3
    for weight, exact in zip(weights, expected, strict=True):
        assert (weight.grad - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_the_first_loss_keeps_its_bits(tmp_path, texts, attention):
    only = replace(LONG, attention=attention, steps=1)
    run = run_of(tmp_path / "with", texts, only)
    train(run, show=False)
    first = metrics(run)[0]
    assert len(first["selection_loss_by_layer"]) == 2
    assert sum(first["selection_loss_by_layer"]) / 2 == pytest.approx(first["selection_loss"])
    without = run_of(tmp_path / "without", texts, replace(only, selection_loss=None))
    train(without, show=False)
    assert metrics(without)[0]["loss"] == first["loss"]
    assert "selection_loss" not in metrics(without)[0]


def test_checkpointed_layers_and_micro_batches_compute_the_same(tmp_path, texts):
    only = replace(LONG, batch_size=4)
    plain = run_of(tmp_path / "plain", texts, only)
    checkpointing = MemorySettings(activation_checkpointing=True)
    again = run_of(tmp_path / "again", texts, only, memory=checkpointing)
    parts = run_of(tmp_path / "parts", texts, replace(only, sequences_at_once=1))
    for run in (plain, again, parts):
        train(run, show=False)
    assert course(again) == course(plain)
    assert selection_losses(again) == selection_losses(plain)
    assert selection_losses(parts) == pytest.approx(selection_losses(plain), rel=1e-2)


def test_steps_between_train_without_it(tmp_path, texts):
    every = replace(SIGNAL, every=2)
    run = run_of(tmp_path / "run", texts, replace(LONG, steps=4, selection_loss=every))
    train(run, show=False)
    assert [loss is not None for loss in selection_losses(run)] == [True, False, True, False]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # as in test_loader
def test_packed_documents_resume_in_the_same_bits(tmp_path, monkeypatch):
    texts = [f"{i} is a number. " * (i % 7 + 1) for i in range(90)]
    path = write_lines(tmp_path / "a.jsonl", texts)
    data = DataSettings(source=str(path), packing="documents", held_out_percent=0)
    only = replace(LONG, steps=8, length_buckets=(32, 64))
    straight = run_of(tmp_path / "straight", tmp_path, only, data=data)
    expected = train(straight, show=False)
    assert selection_losses(straight)[-1] > 0
    run = run_of(tmp_path / "run", tmp_path, only, data=data)
    run = replace(run, checkpoint=CheckpointSettings(every=3))
    with monkeypatch.context() as patch:
        patch.setattr(PackedSampler, "batch", interrupted(PackedSampler.batch, 4))
        assert train(run, show=False).signal == signal.SIGINT
    torch.rand(7)  # another process would stand elsewhere in the random numbers
    resumed = train(run, resume=True, show=False)
    assert weights_hash(resumed.model) == weights_hash(expected.model)
    assert course(run) == course(straight)
    assert selection_losses(run) == selection_losses(straight)


def test_bfloat16_arithmetic_stays_close(tmp_path, texts):
    exact = run_of(tmp_path / "exact", texts)
    rounded = run_of(
        tmp_path / "rounded", texts, model=ModelSettings(tiny=TINY, arithmetic="bfloat16")
    )
    train(exact, show=False)
    train(rounded, show=False)
    assert selection_losses(rounded) != selection_losses(exact)
    assert selection_losses(rounded) == pytest.approx(selection_losses(exact), rel=0.2)


@pytest.mark.slow  # compiles two layers
def test_compiled_layers_compute_the_same(tmp_path, texts):
    found = []
    for kind in ("never", "always"):
        place = RunSettings(folder=tmp_path / kind, device="cpu", compile=kind)
        checkpointing = MemorySettings(activation_checkpointing=True)
        run = run_of(tmp_path / kind, texts, run=place, memory=checkpointing)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Inductor's own
            train(run, show=False)
        found.append(selection_losses(run))
    assert found[1] == pytest.approx(found[0], rel=1e-2)


def test_the_model_is_unpatched_and_unobserved_after_the_block():
    model = build_model(ModelSettings(tiny=TINY), 128)
    tokens = torch.arange(128)[None]
    before = model(tokens).logits
    dense = replace(LONG, attention="dense")
    with stage_attention(model, dense, ATTENTION) as attention:
        assert attention.sparse_layers == 0.0
        assert torch.equal(model(tokens).logits, before)
    assert all(row.patched_through == "" for row in describe(model))
    patch_model(model, ATTENTION)
    with stage_attention(model, LONG, ATTENTION):
        assert model.model.layers[0].self_attn.infllm_layer.observe is not None
    assert not hasattr(model.model.layers[0].self_attn, "infllm_layer")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel": ParallelSettings(context=2)}, "parallel must have context: 1, because stag"),
        (
            {"attention": replace(ATTENTION, window_size=112)},
            "17 blocks of attention.block_size = 8",
        ),
    ],
)
def test_runs_that_cannot_have_it_are_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        run_of(tmp_path, tmp_path, **changes)


def test_another_selection_is_refused_beside_it():
    model = build_model(ModelSettings(tiny=TINY), 128)
    said = "selection_loss needs whole sequences and the selection of the settings"
    with (
        pytest.raises(ValueError, match=said),
        stage_attention(model, LONG, ATTENTION, attend=lambda layer: None),
    ):
        pass


def test_mistakes_in_a_file_are_named_with_their_lines(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {folder: r}\nmodel: {path: m}\nstages:\n  long:\n    max_length: 64\n"
        "    batch_size: 1\n    steps: 1\n    learning_rate: 1e-3\n"
        "    selection_loss: {wieght: 1, weight: 0,\n      queries: 0}\n"
    )
    with pytest.raises(ConfigError) as caught:
        build_dataclass(TrainingSettings, load_yaml(path))
    said = str(caught.value)
    assert (
        "run.yaml:9: stages.long.selection_loss.wieght: unknown key (did you mean weight?)" in said
    )
    assert "weight: must be above 0 and at most 1000, got 0.0: to train without" in said
    assert "run.yaml:10: stages.long.selection_loss.queries: must be between 1 and" in said
    path.write_text(
        path.read_text()
        .replace("wieght: 1, weight: 0", "weight: 1")
        .replace("queries: 0", "queries: 65")
    )
    with pytest.raises(ConfigError, match="queries of at most max_length = 64, got 65"):
        build_dataclass(TrainingSettings, load_yaml(path))
